"""Finds which modules read which outputs, by watching a copy of the network run."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qat_lightning.base import random_state
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.torch_internals import BatchNorm, tree_leaves
from qat_lightning.modes.graph.flow import Flow, attributes, is_leaf


def watched(network: nn.Module, inputs: Inputs, keep_float: tuple[str, ...]) -> list[Flow]:
    """Returns the flows of `network` in eval and in training mode, from running copies of it on `inputs`.

    If the forward needs more arguments in training, such as targets, it is watched in eval mode only.
    Batch-norms stay in eval mode, since they would refuse a batch of one.

    Raises:
        ValueError: The network does not run on `inputs`.
    """
    try:
        with random_state.preserved():
            flows = [_watch(network, inputs, keep_float, training=False)]
            with suppress(Exception):
                flows.append(_watch(network, inputs, keep_float, training=True))
    except Exception as error:
        raise ValueError(
            f"{type(network).__name__} cannot be traced, and it does not run on the example inputs, which "
            f"would show what to fuse: {error} ({type(error).__name__}). example_inputs must be the "
            "arguments of forward: a tuple, a mapping or a tensor."
        ) from error
    return flows


@torch.no_grad()
def _watch(network: nn.Module, inputs: Inputs, keep_float: tuple[str, ...], training: bool) -> Flow:
    twin, inputs = copy.deepcopy((network, inputs))
    twin.train(training)
    for module in twin.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    watch = _Watch()
    for name, module in twin.named_modules():
        if name and is_leaf(module, name, keep_float):
            watch.follow(module, name)
    with watch:
        watch.read(twin(*inputs.args, **inputs.kwargs))
    watch.read(attributes(twin))
    return watch.flow


class _Watch(TorchFunctionMode):
    """A mode that notes in a flow which outputs the leaf modules, and the functions between them, read."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self.depth = 0
        # Holding the tensors keeps their ids from being reused.
        self.makers: dict[int, tuple[str, torch.Tensor]] = {}

    def follow(self, module: nn.Module, name: str) -> None:
        """Watches a leaf module from now on."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.depth == 0:
                self.flow.calls[name] += 1
                alone = len(args) == 1 and not kwargs
                self.read((args, kwargs), name if alone else None)
            self.depth += 1

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            self.depth -= 1
            if self.depth == 0:
                self.flow.readers.setdefault(name, [])
                self.makers |= {id(value): (name, value) for value in _tensors(output)}

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    def read(self, values: Any, reader: str | None = None) -> None:
        """Notes that `reader` reads the tensors in `values`; None for a reader that is not a module."""
        for value in _tensors(values):
            if id(value) in self.makers:
                maker, _ = self.makers[id(value)]
                self.flow.readers[maker].append(reader)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth == 0:
            self.read((args, kwargs))
        return func(*args, **kwargs)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
