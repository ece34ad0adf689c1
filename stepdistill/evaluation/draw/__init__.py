"""Draws the pictures of the evaluation: the table's rows, the sampler, and the folders of pictures."""
