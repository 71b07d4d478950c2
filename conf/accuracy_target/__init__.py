"""How much int8 may lose before training, or `none`."""
