"""Programs that use `hypergrad` on real problems."""
