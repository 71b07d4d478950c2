"""Refuses forwards that write into a tensor of their network, or advance its generator, before they do.

A trace runs `self.steps.add_(1)` once instead of recording it. It does record `self.mean.copy_(x.mean())`,
but without `torch.no_grad()` and for both modes.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import fx, nn

from qat_lightning.base.torch_internals import (
    DispatchMode,
    is_traced_constant,
    memory_of,
    number_of,
    written,
)
from qat_lightning.modes.purity.impure import Impure
from qat_lightning.modes.purity.structure import held

_FIX = "with untraceable='float', the write stays"
_VIEWS = (
    "detach",
    "view",
    "reshape",
    "flatten",
    "squeeze",
    "unsqueeze",
    "transpose",
    "permute",
    "select",
    "narrow",
)
_IN_PLACE = (
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
)  # fmt: skip


class RefusedWrites(DispatchMode):
    """Raises :class:`Impure` where an operator of this thread would change what `network` holds.

    Attributes:
        refused: The first error that it raised, which the forward may have caught.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.refused: Impure | None = None
        self.owned: dict[int, tuple[str, nn.Module]] = {}
        self.generators: dict[int, str] = {}
        for module, name, value in held(network):
            if isinstance(value, torch.Generator):
                self.generators[number_of(value)] = name
            elif isinstance(value, torch.Tensor) and (memory := memory_of(value)) is not None:
                self.owned[memory] = name, module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in written(func, args, kwargs or {}):
            memory = memory_of(tensor)
            if memory in self.owned:
                self._refuse(_write(*self.owned[memory]))
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, torch.Generator) and number_of(value) in self.generators:
                self._refuse(draw(self.generators[number_of(value)]))
        return func(*args, **(kwargs or {}))

    def _refuse(self, error: Impure) -> NoReturn:
        self.refused = self.refused or error
        raise error


def refuse_recorded_write(node: fx.Node) -> None:
    """Raises :class:`Impure` if `node` writes into a tensor of the network, or into a traced constant."""
    target = _written(node)
    while isinstance(target, fx.Node) and target.op != "get_attr" and _is_view(target):
        target = target.args[0]
    if isinstance(target, fx.Node) and target.op == "get_attr":
        name = str(target.target)
        if is_traced_constant(name):
            raise Impure(
                "its forward writes into a constant tensor, and a graph would create that only once. In a "
                f"submodule of its own, {_FIX}"
            )
        raise _write(name.rpartition(".")[2])


def draw(name: str, module: nn.Module | None = None) -> Impure:
    """Returns the error for a forward that draws from the generator `name` of `module`."""
    return Impure(
        f"its forward draws random numbers from {name!r}, and a graph would repeat them. In a submodule of "
        "its own, with untraceable='float', it draws new ones",
        module,
    )


def _write(name: str, module: nn.Module | None = None) -> Impure:
    return Impure(
        f"its forward writes into {name!r}, and a graph would not. In a submodule of its own, {_FIX}", module
    )


def _written(node: fx.Node) -> Any:
    """Returns what `node` writes into, as an argument of it; None if it writes into nothing."""
    if node.op not in ("call_method", "call_function") or not node.args:
        return None
    if "out" in node.kwargs:
        return node.kwargs["out"]
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    writes = (
        (name.endswith("_") and not name.endswith("__"))
        or name in _IN_PLACE
        or node.target is operator.setitem
        or node.kwargs.get("inplace") is True
    )
    return node.args[0] if writes else None


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _VIEWS
    if node.target is getattr:
        return node.args[1] in ("data", "T", "mT")
    return node.target is operator.getitem
