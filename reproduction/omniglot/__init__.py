"""Omniglot: the archives, the pictures, and the tasks that are drawn from them."""
