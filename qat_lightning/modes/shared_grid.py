"""Operations that move numbers and change none (reshape, mean, concatenation) have one grid on both sides.

torch.ao gives a concatenation and its inputs one fake-quantize, but not what a reshape or a mean before it
reads: in int8, where those keep the grid of their input, tensors of unequal grids would be concatenated.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import fx
from torch.ao.quantization.backend_config import ObservationType, get_native_backend_config

from qat_lightning.fake_quantize import FakeQuantize


@cache
def _sharing() -> frozenset[Any]:
    shares = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    configs = get_native_backend_config().configs
    return frozenset(c.pattern for c in configs if c.observation_type == shares)


def share_grids(prepared: fx.GraphModule) -> None:
    """Makes the fake-quantizes on both sides of each such operation one, in place."""
    one: dict[FakeQuantize, FakeQuantize] = {}
    for node in prepared.graph.nodes:
        if _kind(prepared, node) in _sharing():
            around = [_module(prepared, n) for n in (*node.all_input_nodes, *node.users)]
            group = [one.get(m, m) for m in around if isinstance(m, FakeQuantize)]
            for other in set(group) - set(group[:1]):
                one |= dict.fromkeys((other, *(m for m, o in one.items() if o is other)), group[0])
    for name, module in list(prepared.named_modules(remove_duplicate=False)):
        if module in one:
            prepared.set_submodule(name, one[module])  # type: ignore[index]


def _kind(prepared: fx.GraphModule, node: fx.Node) -> Any:
    return type(_module(prepared, node)) if node.op == "call_module" else node.target


def _module(prepared: fx.GraphModule, node: fx.Node) -> Any:
    return prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
