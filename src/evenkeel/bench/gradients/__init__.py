"""`evenkeel bench gradients`: time to accuracy with compressed gradients."""
