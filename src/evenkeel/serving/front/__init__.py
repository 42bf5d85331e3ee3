"""Serves every front end: the items of a request, their flight, their answers, image files."""
