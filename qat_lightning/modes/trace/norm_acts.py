"""Batch-norms that do more than normalize, such as timm's with an activation: traced as their parts.

torch.ao fuses a batch-norm of torch.nn and no class of one's own. So while a network is traced, such a module
gets a batch-norm of torch.nn as a child, with its own parameters and statistics, that takes the place of its
call of `F.batch_norm`; what it does besides is traced like any other forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.modes.graph.subclass import with_forward

_PART = "batch_norm"
"""What the child is called."""
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def split_norms(network: nn.Module) -> Iterator[None]:
    """Lets the block trace the parts of such modules in `network`; afterwards they are as they were."""
    found = [module for module in network.modules() if _is_own(module)]
    counters = {module: module._buffers["num_batches_tracked"] for module in found}
    classes = {module: type(module) for module in found}
    try:
        for module in found:
            module.add_module(_PART, _plain(module))
            counter = counters[module]
            # Its forward may count the batch it is traced with.
            module._buffers["num_batches_tracked"] = None if counter is None else counter.clone()
            module.__class__ = with_forward(type(module), _parted(type(module).forward))
        yield
    finally:
        for module in found:
            module.__class__ = classes[module]
            module._buffers["num_batches_tracked"] = counters[module]
            module._modules.pop(_PART, None)


def _is_own(module: nn.Module) -> bool:
    """Whether `module` is a batch-norm with a forward of its own that calls `F.batch_norm`."""
    code = getattr(type(module).forward, "__code__", None)
    if not isinstance(module, _KINDS) or _PART in module._modules or code is None:
        return False
    return not type(module).forward.__module__.startswith("torch.") and "batch_norm" in code.co_names


def _plain(module: Any) -> nn.Module:
    """A batch-norm of torch.nn that shares what `module` normalizes with."""
    kind: Any = next(kind for kind in _KINDS if isinstance(module, kind))
    plain = kind(module.num_features, module.eps, module.momentum, affine=False, device="meta")
    plain.affine, plain.track_running_stats = module.affine, module.track_running_stats
    plain._parameters.update(weight=module.weight, bias=module.bias)
    for name in plain._buffers:
        plain._buffers[name] = module._buffers[name]
    return plain.train(module.training)


def _parted(users: Any) -> Any:
    """The user's forward, in a trace of which the child is called in the place of the function."""

    def forward(self: Any, x: Any) -> Any:
        if not isinstance(x, fx.Proxy):
            return users(self, x)
        last = next(iter(reversed(x.node.graph.nodes)))
        function = F.batch_norm
        F.batch_norm = partial(_call_part, self)
        try:
            result = users(self, x)
        finally:
            F.batch_norm = function
        _erase_checks(last, result.node)
        return result

    return forward


def _call_part(
    module: Any, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Calls the child of `module` in the place of `F.batch_norm`, if that would do the same.

    Raises:
        ValueError: It would not. A trace then calls the whole module, and looks no further into it.
    """
    statistics = module._buffers["running_mean"], module._buffers["running_var"]
    unused = module.training and not module.track_running_stats
    same = (
        training == (module.training or statistics[0] is None)
        and all(
            a is (None if unused else b) for a, b in zip((running_mean, running_var), statistics, strict=True)
        )
        and _is(weight, module, "weight")
        and _is(bias, module, "bias")
        and (momentum == module.momentum or module.momentum is None or not module.training)
        and eps == module.eps
    )
    if not same:
        raise ValueError("it normalizes in another way than the batch-norm of torch.nn that it inherits from")
    return module.get_submodule(_PART)(input)


def _is(value: Any, module: nn.Module, name: str) -> bool:
    """Whether a trace got this parameter of `module`."""
    own = module._parameters[name]
    if not isinstance(value, fx.Proxy):
        return value is own
    node, tracer = value.node, cast(Any, value.tracer)
    owner, _, leaf = str(node.target).rpartition(".")
    # Not by getattr, which gives proxies in a trace.
    return node.op == "get_attr" and tracer.root.get_submodule(owner)._parameters.get(leaf) is own


def _erase_checks(last: fx.Node, result: fx.Node) -> None:
    """Erases what follows `last` in its graph and computes nothing but facts about its input.

    The batch-norm of torch.nn checks them itself, and a convolution whose result others ask for its shape is
    not fused.
    """
    for node in reversed(list(last.graph.nodes)):
        if node is last:
            break
        unused = not node.users and node is not result and node.op in ("get_attr", "call_function")
        if unused or node.target is torch._assert:
            last.graph.erase_node(node)
