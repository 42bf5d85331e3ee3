"""The HTTP front end: protocol, application, server."""
