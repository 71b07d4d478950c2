"""The softmax of attention, as one operation of a graph."""

from __future__ import annotations

import torch


def attention_weights(
    scores: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    width: int = 1,
) -> torch.Tensor:
    """Returns the weights that `F.scaled_dot_product_attention` gives the values.

    Args:
        scores: The products of queries and keys, of shape (…, queries, keys).
        mask: True where a query may see a key, or a number to add to each score.
        scale: The factor of the scores; None for the inverse square root of `width`.
        is_causal: Whether a query sees only the keys up to its own place.
        width: The number of features of a query.

    Returns:
        A tensor like `scores`, whose last dimension adds up to 1, or to 0 where a query sees no key.
    """
    scores = scores * (width**-0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype != torch.bool:
        return (scores + mask).softmax(-1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0)
