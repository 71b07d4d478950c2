"""The files that a run ends with."""
