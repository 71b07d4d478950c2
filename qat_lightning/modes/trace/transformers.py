"""Makes torch.nn's transformer layers traceable: their linear layers are quantized, attention stays float.

torch.fx treats each module of torch.nn as a single call, and the forwards of these modules also branch on
values. While a network is traced, they run plain forwards: the same functions without the fast paths.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from qat_lightning.base.subclass import forward_of, other_classes
from qat_lightning.base.torch_internals import feed_forward, self_attention

_Mask = Tensor | None


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


_PLAIN: dict[Any, Callable[..., Any]] = {
    nn.TransformerEncoderLayer.forward: _encoder_layer,
    nn.TransformerEncoder.forward: _encoder,
    nn.TransformerDecoderLayer.forward: nn.TransformerDecoderLayer.forward,  # plain as it is
    nn.TransformerDecoder.forward: _decoder,
}


def traceable_transformers(network: nn.Module) -> AbstractContextManager[None]:
    """Gives torch.nn's transformer layers in `network` plain forwards while it is traced."""
    kinds = {module: type(module) for module in network.modules() if forward_of(module) in _PLAIN}
    return other_classes({module: _plain_class(kind) for module, kind in kinds.items()})


def _plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"forward": _PLAIN[kind.forward], "__module__": __name__})
