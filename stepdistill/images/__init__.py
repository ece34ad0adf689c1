"""Pictures as arrays: a sheet of them, and how sharpness, contrast and colour differ."""
