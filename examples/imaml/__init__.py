"""The two programs of the laboratory under short names; see `reproduction`."""
