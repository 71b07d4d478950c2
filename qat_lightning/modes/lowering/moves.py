"""Operations that only move or choose values: they run on the bytes themselves."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.modes.functions.pads import pad_values
from qat_lightning.modes.graph.nodes import call_target, module_of
from qat_lightning.modes.layers.moves import pads_with_zeros
from qat_lightning.modes.lowering.functions import RELUS
from qat_lightning.modes.lowering.graph import Bytes, Writer, arguments
from qat_lightning.modes.lowering.int8.paddings import PadValues, Rectify, ZeroPad
from qat_lightning.modes.lowering.pooling import max_pool_of

_MOVES: frozenset[Any] = frozenset(
    {
        *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
        *(torch.flatten, torch.reshape, torch.unflatten, torch.transpose, torch.permute, torch.movedim),
        *(torch.swapaxes, torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, torch.tensor_split),
        *(torch.unbind, torch.narrow, torch.select, torch.roll, torch.flip, torch.repeat_interleave),
        *(torch.tile, torch.index_select, torch.clone, F.pixel_shuffle, F.pixel_unshuffle),
        *(F.channel_shuffle, operator.getitem),
        *("flatten", "unflatten", "reshape", "view", "transpose", "permute", "movedim", "swapaxes"),
        *("squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "roll"),
        *("flip", "expand", "repeat", "repeat_interleave", "tile", "index_select", "t", "clone", "detach"),
    }
)
"""Types, functions and methods whose first argument is the tensor."""
_JOINS: frozenset[Any] = frozenset({torch.cat, torch.concat, torch.concatenate, torch.stack})
"""Functions of a list of tensors."""
_SAME: frozenset[Any] = frozenset({nn.Identity, "contiguous"})
"""Operations that a network of bytes leaves out: its layers choose the layout themselves."""
_METADATA = frozenset({"shape", "ndim"})
_SIZES: frozenset[Any] = frozenset({"size", "dim", "ndimension", "numel", torch.numel})
_ZERO_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)


def reads_shape(node: fx.Node) -> bool:
    """Whether a node reads the sizes of its first argument, and no values."""
    if node.target is getattr:
        return node.args[1] in _METADATA
    return node.op != "call_module" and node.target in _SIZES


def moved_bytes(writer: Writer, node: fx.Node) -> Bytes | None:
    """Writes an operation that moves or chooses bytes; None if `node` is another, or reads floats."""
    target, sources = call_target(writer.reference, node), _sources(node)
    found = [writer.bytes.get(source) for source in sources]
    first = found[0] if found else None
    if first is None or any(each is None or each.rounding is not first.rounding for each in found):
        return None
    if target in _SAME:
        return first
    module = module_of(writer.reference, node)
    written: Any = None
    if target in _JOINS or target in _MOVES:
        written = writer.copy(node, of_bytes=True)
        written.target = "reshape" if target == "view" else written.target
    elif target in RELUS:
        written = writer.call(f"{node.name}_int8", Rectify(first.qparams), first.node)
    elif _is_nearest(module, node):
        written = writer.copy(node, of_bytes=True)
    elif len(node.all_input_nodes) == 1:  # the sizes are constant
        written = _window(writer, node, first)
    return None if written is None else first._replace(node=written)


def _window(writer: Writer, node: fx.Node, source: Bytes) -> fx.Node | None:
    """Writes a padding, or a pooling that chooses values."""
    module = module_of(writer.reference, node)
    if (pool := max_pool_of(module or node.target, node)) is not None:
        return writer.call(f"{node.name}_int8", pool, source.node)
    if node.target is pad_values:
        return writer.call(f"{node.name}_int8", pad_values_of(node), source.node)
    if (pads := _zero_padding(module, node)) is not None:
        return writer.call(f"{node.name}_int8", ZeroPad(pads, source.qparams), source.node)
    return None


def _sources(node: fx.Node) -> list[fx.Node]:
    """Returns the tensors that a node reads: its first argument, or each of a list there."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    listed = first if isinstance(first, list | tuple) else [first]
    return [each for each in listed if isinstance(each, fx.Node)]


def _zero_padding(module: Any, node: fx.Node) -> Sequence[int] | None:
    """Returns how many zeros to add on each side; None if a node does something else."""
    if isinstance(module, _ZERO_PADS):
        return tuple(module.padding)
    if node.target is not F.pad or not pads_with_zeros(node):
        return None
    _, pads, mode, _ = arguments(node, "input", "pad", ("mode", "constant"), ("value", None))
    return tuple(pads) if mode == "constant" else None


def _is_nearest(module: Any, node: fx.Node) -> bool:
    """Whether a node resizes an image by copying values."""
    if isinstance(module, nn.Upsample):
        return module.mode in ("nearest", "nearest-exact")
    known = node.target is F.interpolate and len(node.args) < 4
    return known and node.kwargs.get("mode", "nearest") in ("nearest", "nearest-exact")


def pad_values_of(node: fx.Node) -> PadValues:
    """Returns the padding that a call of :func:`~qat_lightning.modes.functions.pads.pad_values` does."""
    return PadValues(*arguments(node, "x", "pads", "mode")[1:])
