"""Serves predictions on time: gateway, policies, health, front end, configuration, simulator."""
