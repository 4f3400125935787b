"""What the core must reach, measured beside honest plain contenders. `make bench`; docs/benchmarks.md explains it."""
