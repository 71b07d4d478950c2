"""The layers of a prepared network: how they train, and what they compute in eval mode."""
