"""Reading and editing `torch.fx` graphs, and running one in place of a module's forward."""
