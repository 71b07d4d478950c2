"""FX graph mode: torch.ao's workflow on a graph that is traced from the network."""
