"""Measurements beside the trainings."""
