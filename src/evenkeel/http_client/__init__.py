"""Sends HTTP/1.1 requests in callbacks, over connections that are kept."""
