"""Modules that compute with bytes: what an int8 network on plain tensors consists of."""
