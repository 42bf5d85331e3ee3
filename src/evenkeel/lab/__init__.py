"""Emulates a cluster on one Linux machine: hosts are network namespaces, links have a rate."""
