"""Questions about a network before it is trained: what int8 costs it, and what it needs to stay accurate."""
