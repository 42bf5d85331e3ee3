"""Trains linear models where the data is: exact gradients although devices leave."""
