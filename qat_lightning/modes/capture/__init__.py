"""Capture with values: a network runs on an example, and what it does to tensors becomes a graph."""
