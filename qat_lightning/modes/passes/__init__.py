"""The passes that turn the graph of a float network into that of a prepared one, in order."""
