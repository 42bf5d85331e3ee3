"""Runs `evenkeel bench codes`: measures the error of a mean against the bits that it takes."""
