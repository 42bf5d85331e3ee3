"""Runs workers of our own inside actors on a Ray cluster: Ray places and watches them, our frames carry the tasks."""
