"""Holds networks for images in PyTorch, their training and their export."""
