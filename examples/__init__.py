"""Scripts to start one's own from; each says in its docstring how to run it."""
