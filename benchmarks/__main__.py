"""Run all benchmarks: ``python -m benchmarks``."""

from benchmarks import memory, product

product.main()
memory.main()
