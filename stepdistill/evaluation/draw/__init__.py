"""Draws the images of the evaluation: the table's rows, the sampler, and the folders of images."""
