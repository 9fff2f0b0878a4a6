"""Meta-learn to tell handwritten characters apart: ``python -m examples.imaml.omniglot``."""

from reproduction.omniglot.archive import OmniglotError
from reproduction.runs.command_line import finish
from reproduction.runs.omniglot import main

if __name__ == "__main__":
    finish(main, expected=(OmniglotError,))
