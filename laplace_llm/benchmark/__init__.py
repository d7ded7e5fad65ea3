"""Benchmarks on top of the public API: ``python -m laplace_llm.benchmark speed | calibration``."""
