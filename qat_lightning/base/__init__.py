"""Foundations of all other packages: errors, atomic writes, random state, the schedule, CPU features."""
