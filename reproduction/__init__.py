"""The laboratory: the comparison of iMAML with the systems beside it, and what was measured."""
