"""Reading and editing `torch.fx` graphs, and putting them back in the place of a forward."""
