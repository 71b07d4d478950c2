"""Scripts that measure; each says in its docstring what to run."""
