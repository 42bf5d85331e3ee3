"""Serves from a light model beside the camera: thresholds with a guarantee, from images and from audited answers."""
