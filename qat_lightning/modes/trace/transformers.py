"""Makes torch.nn's attention and transformer layers traceable, so that their linear layers are quantized.

torch.fx treats each module of torch.nn as a single call, and the forwards of these modules also branch on
values. While a network is traced, they run plain forwards: the same functions without the fast paths. What
attention computes between its projections becomes one call, of :func:`attend`, which stays float.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from qat_lightning.base.subclass import forward_of, other_classes
from qat_lightning.base.torch_internals import feed_forward, self_attention

_Mask = Tensor | None


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
    unbatched, moved = projected[0].ndim == 2, projected[0].ndim == 3 and not batch_first
    parts = [x.unsqueeze(0) if unbatched else x.transpose(0, 1) if moved else x for x in projected]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in _query_key_value(parts, biases))
    if add_zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    causal = is_causal and masks[0] is None and not weights  # then the hint replaces the mask
    mask = None if causal else _merged(masks, heads, q.dtype, (biases is not None) + add_zero)
    if weights:
        out, shares = _attend_explicitly(q, k, v, mask, dropout)
        shares = shares.mean(1) if average else shares
    else:
        out, shares = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
    out = out.transpose(1, 2).flatten(2)
    if unbatched:
        return out.squeeze(0), None if shares is None else shares.squeeze(0)
    return out.transpose(0, 1) if moved else out, shares


def _query_key_value(
    projected: list[Tensor], biases: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query, key and value, with the biases at the end of keys and values."""
    q, k, v = projected[0].chunk(3, -1) if len(projected) == 1 else projected
    if biases is None:
        return q, k, v
    added_k, added_v = (bias.expand(k.shape[0], -1, -1) for bias in biases)
    return q, torch.cat([k, added_k], 1), torch.cat([v, added_v], 1)


def _merged(masks: tuple[_Mask, _Mask], heads: int, dtype: torch.dtype, added: int) -> _Mask:
    """Returns one mask to add to the scores, of four dimensions or fewer, with `added` columns of zeros."""
    padding, mask = (None if m is None else F.pad(_to_add(m, dtype), (0, added)) for m in masks)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, heads))
    if padding is None:
        return mask
    padding = padding.reshape(-1, 1, 1, padding.shape[-1])
    return padding if mask is None else mask + padding


def _to_add(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _attend_explicitly(q: Tensor, k: Tensor, v: Tensor, mask: _Mask, dropout: float) -> tuple[Tensor, Tensor]:
    scores = (q * sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return weights @ v, weights


def _attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: _Mask = None,
    need_weights: bool = True,
    attn_mask: _Mask = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if is_causal and attn_mask is None:
        raise RuntimeError("nn.MultiheadAttention needs attn_mask where is_causal says that it is causal.")
    attended = attend(
        _projected(self, query, key, value),
        (key_padding_mask, attn_mask),
        None if self.bias_k is None else (self.bias_k, self.bias_v),
        heads=self.num_heads,
        batch_first=self.batch_first,
        add_zero=self.add_zero_attn,
        dropout=self.dropout if self.training else 0.0,
        weights=need_weights,
        average=average_attn_weights,
        is_causal=is_causal,
    )
    out = F.linear(attended[0], self.out_proj.weight, self.out_proj.bias)
    return out, attended[1] if need_weights else None


def _projected(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Projects query, key and value; if they are the same, all three at once."""
    weight, bias, size = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
    if weight is not None and query is key and key is value:
        return (F.linear(query, weight, bias),)
    rows = [slice(i * size, (i + 1) * size) for i in range(3)]
    separate = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    weights = separate if weight is None else [weight[row] for row in rows]
    biases = [None] * 3 if bias is None else [bias[row] for row in rows]
    return tuple(map(F.linear, (query, key, value), weights, biases))


def _encoder_layer(
    self: Any,
    src: Tensor,
    src_mask: _Mask = None,
    src_key_padding_mask: _Mask = None,
    is_causal: bool = False,
) -> Tensor:
    x = src
    if self.norm_first:
        x = x + self_attention(self, self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
        return x + feed_forward(self, self.norm2(x))
    x = self.norm1(x + self_attention(self, x, src_mask, src_key_padding_mask, is_causal=is_causal))
    return self.norm2(x + feed_forward(self, x))


def _encoder(
    self: Any,
    src: Tensor,
    mask: _Mask = None,
    src_key_padding_mask: _Mask = None,
    is_causal: bool | None = None,
) -> Tensor:
    x = src
    for layer in self.layers:
        x = layer(x, mask, src_key_padding_mask, bool(is_causal))
    return x if self.norm is None else self.norm(x)


def _decoder(
    self: Any,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: _Mask = None,
    memory_mask: _Mask = None,
    tgt_key_padding_mask: _Mask = None,
    memory_key_padding_mask: _Mask = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    x = tgt
    masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
    for layer in self.layers:
        x = layer(x, memory, *masks, bool(tgt_is_causal), memory_is_causal)
    return x if self.norm is None else self.norm(x)


def _transformer(
    self: Any,
    src: Tensor,
    tgt: Tensor,
    src_mask: _Mask = None,
    tgt_mask: _Mask = None,
    memory_mask: _Mask = None,
    src_key_padding_mask: _Mask = None,
    tgt_key_padding_mask: _Mask = None,
    memory_key_padding_mask: _Mask = None,
    src_is_causal: bool | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
    masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
    decoded: Tensor = self.decoder(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
    return decoded


_PLAIN: dict[Any, Callable[..., Any]] = {
    nn.MultiheadAttention.forward: _attention,
    nn.Transformer.forward: _transformer,
    nn.TransformerEncoderLayer.forward: _encoder_layer,
    nn.TransformerEncoder.forward: _encoder,
    nn.TransformerDecoderLayer.forward: nn.TransformerDecoderLayer.forward,  # plain as it is
    nn.TransformerDecoder.forward: _decoder,
}


def traceable_transformers(network: nn.Module) -> AbstractContextManager[None]:
    """Gives torch.nn's attention and transformer layers in `network` plain forwards while it is traced."""
    kinds = {module: type(module) for module in network.modules() if has_plain_forward(module)}
    return other_classes({module: _plain_class(kind) for module, kind in kinds.items()})


def has_plain_forward(module: nn.Module) -> bool:
    """Whether `module` runs a plain forward while it is traced."""
    return forward_of(module) in _PLAIN


def _plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"forward": _PLAIN[kind.forward], "__module__": __name__})
