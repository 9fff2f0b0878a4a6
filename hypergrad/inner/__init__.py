"""Inner solvers."""
