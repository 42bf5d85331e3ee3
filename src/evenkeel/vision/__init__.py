"""Trains and exports the classifier and its Collage-CNN. The only part of the serving wing that loads torch."""
