"""Runs `evenkeel bench aggregation`: simulates what scarce memory in a switch costs training jobs."""
