"""Serves over HTTP: protocol, application, server."""
