"""Reaches replicas behind any Open Inference Protocol server."""
