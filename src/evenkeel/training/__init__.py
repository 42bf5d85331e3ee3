"""Trains over slow networks: wraps DDP, and predicts what that gains."""
