"""Answers the Open Inference Protocol over gRPC."""
