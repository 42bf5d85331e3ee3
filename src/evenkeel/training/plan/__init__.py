"""Predicts what a code or a schedule would gain on a network."""
