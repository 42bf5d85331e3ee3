"""Networks for images in PyTorch, their training and their export."""
