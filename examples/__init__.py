"""Scripts to start from; the docstring of each says how to run it."""
