"""The report of a run: how good, how fast and how faithful its int8 network is."""
