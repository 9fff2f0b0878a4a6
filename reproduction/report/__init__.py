"""The reproduction of iMAML: a list of runs, what carries them out, and the report."""
