"""Finds out where nodes are, and goes on doing so: in a file, by DNS, in Kubernetes."""
