"""Trainings: the two programs, their command line, and what is kept of a run."""
