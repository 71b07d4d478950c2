"""Functions of this package that stand in a graph as one operation."""
