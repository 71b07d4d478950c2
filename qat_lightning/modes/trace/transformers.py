"""Makes torch.nn's attention and transformer layers traceable, so that their linear layers are quantized.

torch.fx treats each module of torch.nn as a single call, and the forwards of these modules also branch on
values. While a network is traced, they run plain forwards: the same functions without the fast paths. What
attention computes between its projections becomes one call, of :func:`attend`, which stays float.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning.base.subclass import forward_of, other_classes
from qat_lightning.base.torch_internals import feed_forward, self_attention
from qat_lightning.modes.functions.attention import attend

_Mask = Tensor | None


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
