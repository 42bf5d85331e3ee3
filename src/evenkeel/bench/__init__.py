"""Measuring tools: what `evenkeel bench` and `evenkeel demo` run."""
