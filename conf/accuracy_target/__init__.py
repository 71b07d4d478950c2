"""How many percentage points int8 may lose before training, or `none`."""
