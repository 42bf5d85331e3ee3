"""Replicas behind any Open Inference Protocol server."""
