"""Shows a running server in a browser: one page, and a feed that it follows."""
