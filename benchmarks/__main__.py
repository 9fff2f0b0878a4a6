"""Run all benchmarks: ``python -m benchmarks``."""

from benchmarks import evidence, memory, product

product.main()
evidence.main()
memory.main()
