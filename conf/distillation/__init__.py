"""Whose logits the network learns beside its labels, or `none`."""
