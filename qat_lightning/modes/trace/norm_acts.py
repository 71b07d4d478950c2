"""Splits user-defined batch-norms, such as timm's with an activation, so that torch.ao can fuse them.

torch.ao fuses the batch-norms of torch.nn, but no user-defined class. So while a network is traced, such a
module gets a torch.nn batch-norm as a child, which shares its parameters and statistics. The trace calls this
child instead of `F.batch_norm`, and traces the rest of the module's forward as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qat_lightning.base.subclass import forward_of, other_classes, with_forward
from qat_lightning.base.torch_internals import ASSERT, buffers_of, modules_of, parameters_of

_CHILD = "batch_norm"
"""The name of the child."""
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def split_norms(network: nn.Module) -> Iterator[None]:
    """Splits such modules in `network` while the block traces it; afterwards they are as before."""
    kinds = {module: type(module) for module in network.modules() if _calls_batch_norm(module)}
    try:
        for module in kinds:
            module.add_module(_CHILD, _plain(module))
        split = {m: with_forward(kind, _split_forward(kind.forward)) for m, kind in kinds.items()}
        with other_classes(split):
            yield
    finally:
        for module in kinds:
            modules_of(module).pop(_CHILD, None)


def _calls_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is a batch-norm with a user-defined forward that calls `F.batch_norm`."""
    code = getattr(forward_of(module), "__code__", None)
    if not isinstance(module, _KINDS) or _CHILD in modules_of(module) or code is None:
        return False
    return not type(module).forward.__module__.startswith("torch.") and "batch_norm" in code.co_names


def _plain(module: Any) -> nn.Module:
    """Returns a torch.nn batch-norm that shares the parameters and statistics of `module`."""
    kind: Any = next(kind for kind in _KINDS if isinstance(module, kind))
    plain = kind(module.num_features, module.eps, module.momentum, affine=False, device="meta")
    plain.affine, plain.track_running_stats = module.affine, module.track_running_stats
    parameters_of(plain).update(weight=module.weight, bias=module.bias)
    for name in buffers_of(plain):
        buffers_of(plain)[name] = buffers_of(module)[name]
    return plain.train(module.training)


def _split_forward(user_forward: Any) -> Any:
    """Returns the user's forward; in a trace it calls the child instead of `F.batch_norm`."""

    def forward(self: Any, x: Any) -> Any:
        if not isinstance(x, fx.Proxy):
            return user_forward(self, x)
        last = next(iter(reversed(x.node.graph.nodes)))
        with _ChildInstead(self), _counter_of_its_own(self):
            result = user_forward(self, x)
        _erase_checks(last, result.node)
        return result

    return forward


@contextmanager
def _counter_of_its_own(module: nn.Module) -> Iterator[None]:
    """Lets the block increment a copy of the batch-norm's counter: the child increments the counter."""
    buffers = buffers_of(module)
    counter = buffers["num_batches_tracked"]
    buffers["num_batches_tracked"] = None if counter is None else counter.clone()
    try:
        yield
    finally:
        buffers["num_batches_tracked"] = counter


class _ChildInstead(TorchFunctionMode):
    """Calls the child of a module where its forward calls `F.batch_norm`, in this thread alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(_call_child, self.module) if func is F.batch_norm else func
        return call(*args, **(kwargs or {}))


def _call_child(
    module: Any, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Calls the child of `module` instead of `F.batch_norm`, if that computes the same.

    Raises:
        ValueError: It does not. The trace then records the module as a single call.
    """
    statistics = buffers_of(module)["running_mean"], buffers_of(module)["running_var"]
    unused = module.training and not module.track_running_stats
    same = (
        training == (module.training or statistics[0] is None)
        and all(
            _behind(a) is (None if unused else b)
            for a, b in zip((running_mean, running_var), statistics, strict=True)
        )
        and _is_parameter(weight, module, "weight")
        and _is_parameter(bias, module, "bias")
        and (momentum == module.momentum or module.momentum is None or not module.training)
        and eps == module.eps
    )
    if not same:
        raise ValueError("it normalizes differently from the torch.nn batch-norm that it inherits from")
    return module.get_submodule(_CHILD)(input)


def _behind(value: Any) -> Any:
    """Returns the value that a proxy of a capture carries, and any other value as it is."""
    return vars(value)["value"] if isinstance(value, fx.Proxy) and "value" in vars(value) else value


def _is_parameter(value: Any, module: nn.Module, name: str) -> bool:
    """Whether `value`, in a trace, is the parameter `name` of `module`."""
    own = parameters_of(module)[name]
    if not isinstance(value, fx.Proxy):
        return value is own
    node, tracer = value.node, cast(Any, value.tracer)
    owner, _, leaf = str(node.target).rpartition(".")
    # In a trace, getattr would return a proxy.
    return node.op == "get_attr" and parameters_of(tracer.root.get_submodule(owner)).get(leaf) is own


def _erase_checks(last: fx.Node, result: fx.Node) -> None:
    """Erases the nodes after `last` that only check the input's shape and the like.

    The torch.nn batch-norm does these checks itself, and torch.ao would not fuse a convolution whose result
    they read.
    """
    for node in reversed(list(last.graph.nodes)):
        if node is last:
            break
        unused = not node.users and node is not result and node.op in ("get_attr", "call_function")
        if unused or node.target is ASSERT:
            last.graph.erase_node(node)
