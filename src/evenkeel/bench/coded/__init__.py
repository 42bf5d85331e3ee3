"""Answers what codes gain for training on devices that are slow or leave: `evenkeel bench coded`."""
