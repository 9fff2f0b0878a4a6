"""Losses that are sums over processes."""
