"""Benchmark cases, providers, measurement and report: used by the command line and by ``benchmarks/``."""
