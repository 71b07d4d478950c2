"""Tracing: turns a float network into a graph that follows `train()` and `eval()`."""
