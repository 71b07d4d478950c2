"""From a float network to a graph that follows `train()` and `eval()`."""
