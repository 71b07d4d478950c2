"""Attention between its projections: as one operation, or as products of matrices and what is around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

_Mask = Tensor | None


def attention_weights(
    scores: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    width: int = 1,
) -> Tensor:
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


def attend(
    projected: tuple[Tensor, ...],
    masks: tuple[_Mask, _Mask],
    biases: tuple[Tensor, Tensor] | None,
    *,
    heads: int,
    batch_first: bool,
    add_zero: bool,
    dropout: float,
    weights: bool,
    average: bool,
    is_causal: bool,
) -> tuple[Tensor, _Mask]:
    """Computes what `nn.MultiheadAttention` does between its projections, in float.

    Args:
        projected: Query, key and value, or one tensor with all three in its last dimension.
        masks: `key_padding_mask` and `attn_mask`.
        biases: `bias_k` and `bias_v`, or None.
        heads: The number of heads.
        batch_first: Whether the batch is the first of three dimensions.
        add_zero: Whether to append zeros to keys and values.
        dropout: The probability; 0 in eval mode.
        weights: Whether to return the attention weights.
        average: Whether to average them over the heads.
        is_causal: Whether the `attn_mask` is the causal mask.

    Returns:
        The input of the output projection, and the weights or None.
    """
    if has_torch_function(projected):  # a trace records the call
        return handle_torch_function(  # type: ignore[no-any-return]
            attend, projected, projected, masks, biases, heads=heads, batch_first=batch_first,
            add_zero=add_zero, dropout=dropout, weights=weights, average=average, is_causal=is_causal,
        )  # fmt: skip
    q, k, v = split_heads(projected, biases, heads, batch_first, add_zero)
    causal = is_causal and masks[0] is None and not weights  # then the hint replaces the mask
    mask = None if causal else merged_mask(masks, q, k)
    shares = None
    if weights:
        shares = attention_weights(q @ k.transpose(-2, -1), mask, width=q.shape[-1])
        shares = F.dropout(shares, dropout) if dropout > 0 else shares
        out = shares @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    out = join_heads(out, projected[0], batch_first)
    if shares is None:
        return out, None
    shares = shares.mean(1) if average else shares
    return out, shares.squeeze(0) if projected[0].ndim == 2 else shares


def split_heads(
    projected: Sequence[Tensor],
    biases: tuple[Tensor, Tensor] | None,
    heads: int,
    batch_first: bool,
    add_zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query, key and value, of shape (batch, heads, length, features of a head).

    The biases, and zeros, are appended to keys and values.
    """
    unbatched, moved = projected[0].ndim == 2, projected[0].ndim == 3 and not batch_first
    parts = [x.unsqueeze(0) if unbatched else x.transpose(0, 1) if moved else x for x in projected]
    q, k, v = parts[0].chunk(3, -1) if len(parts) == 1 else parts
    if biases is not None:
        added_k, added_v = (bias.expand(k.shape[0], -1, -1) for bias in biases)
        k, v = torch.cat([k, added_k], 1), torch.cat([v, added_v], 1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return (q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))) if add_zero else (q, k, v)


def join_heads(out: Tensor, projected: Tensor, batch_first: bool) -> Tensor:
    """Returns what the heads computed in the shape of `projected`, the inverse of :func:`split_heads`."""
    out = out.transpose(1, 2).flatten(2)
    if projected.ndim == 2:
        return out.squeeze(0)
    return out if batch_first else out.transpose(0, 1)


def merged_mask(masks: tuple[_Mask, _Mask], query: Tensor, key: Tensor) -> _Mask:
    """Returns one mask to add to the scores, of four dimensions or fewer, or None.

    Keys that :func:`split_heads` has appended are seen by every query.
    """
    padding, mask = (None if each is None else _to_add(each, query, key) for each in masks)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, query.shape[1]))
    if padding is None:
        return mask
    padding = padding.reshape(-1, 1, 1, padding.shape[-1])
    return padding if mask is None else mask + padding


def _to_add(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if not mask.is_floating_point():
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))
    return F.pad(mask, (0, key.shape[-2] - mask.shape[-1]))
