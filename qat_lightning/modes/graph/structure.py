"""Copies the structure of a network: new modules that share every tensor with the originals.

What is done to such a copy, such as adding modules or assigning attributes, does not reach the original. So a
trace, or a preparation that may be refused halfway, works on a copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import nn

from qat_lightning.base.torch_internals import TABLES, modules_of


def structural_copy(network: nn.Module) -> nn.Module:
    """Returns a copy of `network` with modules of its own and the same parameters and buffers.

    A module that occurs twice also occurs twice in the copy. Plain attributes are shared, except for lists,
    dicts and sets, which are copied, and references to modules of the network, which point into the copy.
    """
    twins = {module: _shell(module) for module in network.modules()}
    for module, twin in twins.items():
        if module is twin:
            continue
        vars(twin).update({name: _follow(value, twins) for name, value in vars(module).items()})
        for name in TABLES:
            vars(twin)[name] = copy.copy(vars(module)[name])
        for name, child in modules_of(module).items():
            modules_of(twin)[name] = None if child is None else twins[child]
    return twins[network]


def _shell(module: nn.Module) -> nn.Module:
    """Returns a new object of the same class without attributes; a TorchScript module stands for itself."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    twin: nn.Module = object.__new__(type(module))  # a graph module's own `__new__` would make a new class
    return twin


def _follow(value: Any, twins: dict[nn.Module, nn.Module]) -> Any:
    """Returns `value` as the copy holds it."""
    if isinstance(value, nn.Module):
        return twins.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, twins.get(value.__self__, value.__self__))
    if type(value) in (list, tuple, set):
        return type(value)(_follow(each, twins) for each in value)
    if type(value) in (dict, OrderedDict):  # the latter hold a module's hooks
        return type(value)((key, _follow(each, twins)) for key, each in value.items())
    return value
