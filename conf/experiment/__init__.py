"""Whole runs: what to change together."""
