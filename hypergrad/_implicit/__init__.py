"""The implicit derivative: from a call to an answer that is judged."""
