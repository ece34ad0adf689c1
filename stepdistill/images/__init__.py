"""Image utilities: a grid of pictures, and differences in sharpness, contrast and colour."""
