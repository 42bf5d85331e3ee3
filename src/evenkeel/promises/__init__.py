"""Keeps promises of accuracy: thresholds with a guarantee, their certificate, the audit."""
