"""A smaller base model: what can be removed from a U-Net, which parts are removed, and the training of what is left."""
