"""Reads model files: cards, the shipped ones, the user's classifier as a black box, what passes cost."""
