"""A gradcheck for bi-level problems."""
