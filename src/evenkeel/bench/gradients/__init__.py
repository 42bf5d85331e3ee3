"""Runs `evenkeel bench gradients`: measures time to accuracy with compressed gradients."""
