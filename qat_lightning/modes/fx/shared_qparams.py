"""Lets operations that only move values (cat, reshape, max pooling) share their input's qparams.

In int8 such an operation keeps the qparams of its input, so that training must do the same. torch.ao gives
its input and its output one fake-quantize, but handles one operation at a time. Where a concatenation reads
a reshaped tensor, the reshape would keep the fake-quantize that it had before. Training and int8 would then
round with different qparams, and PyTorch would warn of "large numerical inaccuracies".
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn
from torch.ao.quantization import FixedQParamsFakeQuantize

from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.modes.graph.dropout import is_dropout
from qat_lightning.modes.graph.nodes import SHARES_INPUT_QPARAMS, call_target, fake_quantize_of


def share_qparams(prepared: fx.GraphModule) -> None:
    """Gives all tensors that share qparams in int8 a single fake-quantize, in place."""
    leader: dict[nn.Module, nn.Module] = {}
    for node in prepared.graph.nodes:
        if call_target(prepared, node) in SHARES_INPUT_QPARAMS:
            inputs = [_before_dropout(prepared, source) for source in node.all_input_nodes]
            around = [fake_quantize_of(prepared, n) for n in (*inputs, *node.users)]
            group = [_leader_of(leader, each) for each in around if each is not None and _is_free(each)]
            leader |= {each: first for first in group[:1] for each in group}
    for node in prepared.graph.nodes:
        fake_quantize = fake_quantize_of(prepared, node)
        if fake_quantize is not None and _leader_of(leader, fake_quantize) is not fake_quantize:
            prepared.set_submodule(str(node.target), _leader_of(leader, fake_quantize))


def count_calls(prepared: fx.GraphModule) -> None:
    """Tells each fake-quantize how many tensors of one forward it rounds."""
    called = [fake_quantize_of(prepared, node) for node in prepared.graph.nodes]
    for fake_quantize, calls in Counter(called).items():
        if isinstance(fake_quantize, FakeQuantize):
            fake_quantize.forward_extremes.calls = calls


def _before_dropout(prepared: fx.GraphModule, node: fx.Node) -> fx.Node:
    while is_dropout(prepared, node):
        (node,) = node.all_input_nodes
    return node


def _leader_of(leader: dict[nn.Module, Any], fake_quantize: nn.Module) -> nn.Module:
    """Returns the fake-quantize that replaces `fake_quantize`, or that one itself."""
    while leader.get(fake_quantize, fake_quantize) is not fake_quantize:
        fake_quantize = leader[fake_quantize]
    return fake_quantize


def _is_free(fake_quantize: nn.Module) -> bool:
    """Whether the qparams follow the data; those of a sigmoid, for example, are fixed."""
    return not isinstance(fake_quantize, FixedQParamsFakeQuantize)
