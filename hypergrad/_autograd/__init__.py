"""What PyTorch does around a call of the library."""
