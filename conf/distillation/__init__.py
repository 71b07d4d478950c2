"""The teacher whose logits the network learns in addition to its labels, or `none`."""
