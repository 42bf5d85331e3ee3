"""A user's images: sources of every form, and their pixels."""
