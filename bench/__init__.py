"""Benchmarks: what `dsg bench` measures."""
