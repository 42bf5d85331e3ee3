"""Training over slow networks: what wraps DDP, and what predicts its gain."""
