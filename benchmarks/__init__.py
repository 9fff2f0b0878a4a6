"""Measurements: ratios within one process, and memory in a fresh process a point."""
