"""Eager mode: PyTorch's workflow for models that hold QuantStubs."""
