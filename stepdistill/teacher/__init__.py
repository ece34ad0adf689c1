"""The model to distil, as it lies on disk: where it is, whether it is whole, what its configs say, how it is loaded."""
