"""Wraps DDP: the hook, its state, Pipe-SGD."""
