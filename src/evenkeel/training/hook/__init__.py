"""What wraps DDP: the hook, its state, Pipe-SGD."""
