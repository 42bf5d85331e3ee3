"""The gateway: items, replicas, spares, policy and budget. Knows no HTTP."""
