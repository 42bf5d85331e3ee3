"""Reads a user's images: one file per form, each an `ImageSource`."""
