"""Runs `evenkeel bench serving` and `evenkeel demo`: compares policies under the same arrivals and delays."""
