"""Eager mode: torch.ao's workflow for networks whose own code contains QuantStubs."""
