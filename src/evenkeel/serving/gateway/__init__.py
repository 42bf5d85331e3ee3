"""Holds the gateway: items, replicas, spares, policy and budget. It knows no HTTP."""
