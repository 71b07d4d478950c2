"""The formats in which a run writes the int8 network."""
