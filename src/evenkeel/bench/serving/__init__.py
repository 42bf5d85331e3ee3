"""`evenkeel bench serving` and `evenkeel demo`: policies under the same arrivals and delays."""
