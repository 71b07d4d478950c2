"""Keeps the processes of a distributed run consistent: merges ranges, compares qparams, shares errors."""
