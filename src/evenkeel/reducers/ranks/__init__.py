"""Exchanges between ranks: over process groups, between threads, in order."""
