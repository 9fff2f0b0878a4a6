"""PyTorch's side of a call of the library: transforms, recordings, modules and kernels."""
