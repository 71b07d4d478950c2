"""Analyses before training: the preflight, the cost of int8 in each layer, and the layers to keep float."""
