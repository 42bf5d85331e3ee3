"""Reads a user's images, of every form, and makes pixels of them."""
