"""Where the int8 network will run, or `float` for none."""
