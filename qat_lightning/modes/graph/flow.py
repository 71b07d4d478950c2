"""Describes which modules read which outputs in a network's forward.

A module may be fused with the one that follows it only if nothing else reads the tensor between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qat_lightning.base.subclass import derives_from
from qat_lightning.base.torch_internals import tree_leaves
from qat_lightning.modes.graph.relu6 import is_inside

TRANSPARENT = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)


@dataclass
class Flow:
    """One run of a forward.

    Attributes:
        calls: How often each module was called, by name.
        readers: For each module, by name, the readers of its output: names of modules, or None for others.
    """

    calls: Counter[str] = field(default_factory=Counter)
    readers: dict[str, list[str | None]] = field(default_factory=dict)


def follower(name: str, flows: Sequence[Flow]) -> str | None:
    """Returns the module that follows `name`; None if there is none that may be fused with it.

    That module is the only reader of the output of `name`. Each flow calls both once, or neither.
    """
    readers = [flow.readers.get(name, []) for flow in flows if flow.calls[name]]
    reader = readers[0][0] if readers and readers[0] else None
    if reader is None or any(others != [reader] for others in readers):
        return None
    once = all(flow.calls[name] == flow.calls[reader] <= 1 for flow in flows)
    return reader if once else None


def is_leaf(module: nn.Module, name: str, keep_float: tuple[str, ...]) -> bool:
    """Whether a flow treats `module` as one unit and ignores what happens inside; not so for an Identity."""
    stub = derives_from(module, "torch.ao.", "QuantStub", "DeQuantStub")
    if stub or is_inside(name, keep_float) or isinstance(module, torch.jit.ScriptModule):
        return True
    package = type(module).__module__
    return package.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, TRANSPARENT)


def attributes(network: nn.Module) -> list[Any]:
    """Returns the values of all module attributes, where a forward may have stored a tensor for later."""
    return [value for module in network.modules() for value in tree_leaves(vars(module))]
