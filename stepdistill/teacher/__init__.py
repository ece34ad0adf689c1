"""The model to distil: finds it on disk, checks that it is complete, reads its configs and loads it."""
