"""The parts that the callback is made of, each with a concern and hooks of its own."""
