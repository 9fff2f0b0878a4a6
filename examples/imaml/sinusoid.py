"""Meta-learn sinusoid regression: ``python -m examples.imaml.sinusoid``."""

from reproduction.runs.command_line import finish
from reproduction.runs.sinusoid import main

if __name__ == "__main__":
    finish(main)
