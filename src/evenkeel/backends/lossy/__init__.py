"""Sends images over a link that loses packets: each packet decodes alone, and holes are concealed."""
