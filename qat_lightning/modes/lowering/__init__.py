"""From a prepared network to what runs as int8: the QDQ graph, and int8 modules made from it."""
