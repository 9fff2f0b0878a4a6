"""Conditions: what an inner solution satisfies."""
