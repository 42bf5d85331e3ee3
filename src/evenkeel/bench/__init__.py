"""Measures: what `evenkeel bench` and `evenkeel demo` run."""
