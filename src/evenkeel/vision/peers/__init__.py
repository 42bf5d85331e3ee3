"""Trains what others do in place of a collage: the paper's detector, parity models."""
