"""Detects NaN and infinity in a prepared network, and names the first tensor that held one.

Raising an error inside `forward` would break `torch.compile`, and would make a GPU wait at every layer. So
each fake-quantize only sets a flag, and this module reads all flags in one transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.modes.graph.graft import graphs
from qat_lightning.modes.graph.nodes import module_of

_FIX = "Lower the learning rate, clip gradients (Trainer(gradient_clip_val=1.0)), or look at the data."


class NonFiniteWatch:
    """Detects NaN and infinity in prepared networks, cheaply enough for every step.

    Args:
        networks: The networks, by name.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._networks = networks
        self._fake_quants = [m for n in networks.values() for m in n.modules() if isinstance(m, FakeQuantize)]

    def clear(self) -> None:
        """Clears the flags that earlier runs have set."""
        for fake_quant in self._fake_quants:
            fake_quant.nonfinite.zero_()

    def check(self, step: int) -> None:
        """Raises a `FloatingPointError` if a NaN or an infinity was observed."""
        if not self._fake_quants or not bool(torch.cat([f.nonfinite for f in self._fake_quants]).any()):
            return
        for name, network in self._networks.items():
            tensor = first_nonfinite(network)
            if tensor is not None:
                raise FloatingPointError(
                    f"A NaN or an infinity appeared in {tensor} of {name or 'the module'!r}, at or before "
                    f"step {step}. No observed range includes it. {_FIX}"
                )

    def check_weights(self, step: int) -> None:
        """Raises a `FloatingPointError` if a weight holds a NaN or an infinity."""
        for name, network in self._networks.items():
            weight = first_nonfinite_weight(network)
            if weight is not None:
                raise FloatingPointError(
                    f"{weight!r} of {name or 'the module'!r} holds a NaN or an infinity at step {step}, so "
                    f"no checkpoint is written. The last checkpoint is from an earlier step. {_FIX}"
                )


def first_nonfinite(network: nn.Module) -> str | None:
    """Names the first tensor, in execution order, in which an observer saw a NaN or an infinity."""
    named = list(_in_execution_order(network))
    if not named:
        return None
    flags = torch.cat([fake_quant.nonfinite for _, fake_quant in named]).tolist()
    return next((name for (name, _), flag in zip(named, flags, strict=True) if flag), None)


def first_nonfinite_weight(network: nn.Module) -> str | None:
    """Names the first parameter that holds a NaN or an infinity. Frozen observers set no flag for it."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in parameters]).tolist()
    return next((name for name, each in zip(names, finite, strict=True) if not each), None)


def _in_execution_order(network: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """Yields each fake-quantize and its tensor's name, in graph order, or in eager mode as registered."""
    graph = next((graph for module, graph in graphs(network) if module is network), None)
    if graph is None:
        for name, module in network.named_modules():
            if isinstance(module, FakeQuantize):
                yield _describe(name), module
        return
    for node in graph.nodes:
        called = module_of(network, node)
        if isinstance(called, FakeQuantize):
            yield _input_of(node), called
        elif isinstance(getattr(called, "weight_fake_quant", None), FakeQuantize):
            yield f"the weight of {node.target!r}", called.weight_fake_quant


def _input_of(node: fx.Node) -> str:
    source = node.all_input_nodes[0]
    if source.op == "placeholder":
        return f"the input {source.target!r}"
    return f"the output of {str(source.target if source.op == 'call_module' else source.name)!r}"


def _describe(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return f"the weight of {owner!r}" if leaf == "weight_fake_quant" else f"the output of {owner!r}"
