"""The method: inner problems, their solvers, and the meta-gradients of the systems."""
