"""Measures modeless serving: who answers, and how images reach the accurate model over links that lose packets."""
