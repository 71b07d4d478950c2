"""Prepares networks, converts them to int8, and saves and loads the results."""
