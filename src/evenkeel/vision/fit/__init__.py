"""Fits Collage-CNNs to a user's classifier."""
