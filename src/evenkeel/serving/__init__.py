"""The gateway: policies, health, front end, configuration, simulator."""
