"""evenkeel keeps distributed machine learning on an even keel."""

__version__ = "0.1.0"
