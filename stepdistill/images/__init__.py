"""Image utilities: a grid of images, and differences in sharpness, contrast and colour."""
