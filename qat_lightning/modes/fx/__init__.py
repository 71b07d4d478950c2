"""FX graph mode: PyTorch's workflow on a graph that is captured from the network."""
