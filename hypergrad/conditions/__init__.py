"""Conditions that an inner solution satisfies."""
