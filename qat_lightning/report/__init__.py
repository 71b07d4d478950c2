"""The report of a run: how accurate and how fast its int8 network is, and how close to what was trained."""
