"""Adds messages: over process groups, in shares, and in threads. `reducer.py` holds the seam and its laws."""
