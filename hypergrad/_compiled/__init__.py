"""Compiled calls: the user's functions captured, derivatives traced, folded, and replayed."""
