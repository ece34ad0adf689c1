"""Measures the images of the evaluation: feature extractors, and distances between sets of images."""
