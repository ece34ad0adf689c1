"""Measures the pictures of the evaluation: feature extractors, and distances between sets of pictures."""
