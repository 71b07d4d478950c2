"""The parts of the callback. Each handles one concern of a run with its own hooks."""
