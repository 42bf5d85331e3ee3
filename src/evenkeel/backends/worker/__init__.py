"""Runs workers of our own: frames, connections, the worker's process and the backends in front of it."""
