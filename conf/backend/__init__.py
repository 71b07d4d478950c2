"""The engine that runs the int8 network, or `float` for no quantization."""
