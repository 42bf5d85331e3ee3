"""Holds the sum codes, each in a file: what compresses a gradient so that the messages can simply be added."""
