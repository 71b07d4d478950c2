"""How accurate int8 networks are after each method, on one budget."""
