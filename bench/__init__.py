"""Benchmarks: one table of cases (``cases.py``), shared with the tests."""
