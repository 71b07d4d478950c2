"""Follows or refuses what surrounds operations in a forward, and would vanish from a graph without a word.

- An autograd function of the user's becomes a single call, which keeps its backward.
- The results of `torch.no_grad()` are detached where they are used outside of it.
- `torch.autocast` and gradient checkpointing are refused: a graph would neither change dtypes nor compute
  again what it did not keep. `torch.autocast(enabled=False)` becomes a guard against mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import checkpoint

from qat_lightning.base.torch_internals import (
    checkpoint_generators,
    modules_of,
    switches_autocast_on,
    tree_map_only,
)
from qat_lightning.modes.graph.dropout import detached
from qat_lightning.modes.graph.guards import check_no_autocast
from qat_lightning.modes.graph.lines import current_user_line
from qat_lightning.modes.trace.one_thread import ONE_AT_A_TIME, replaced


class AutogradFunction(nn.Module):
    """A call of a user-defined autograd function, which a graph holds as a module.

    Args:
        function: A subclass of `torch.autograd.Function`.
    """

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function.apply(*args)


@contextmanager
def watched_contexts(tracer: Any) -> Iterator[None]:
    """Makes `tracer` see autograd functions, and refuse autocast and checkpointing, in this thread alone."""
    apply = vars(torch.autograd.Function)["apply"]
    enter = torch.autocast.__enter__

    def apply_or_record(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not (tracer.records() and _holds_proxy(args)):
            return apply.__get__(None, cls)(*args, **kwargs)
        if issubclass(cls, checkpoint.CheckpointFunction):
            raise TypeError(_CHECKPOINTING)
        return tracer.create_proxy("call_module", _register(tracer.root, cls), args, kwargs)

    def enter_or_refuse(self: Any) -> Any:
        if tracer.records() and switches_autocast_on(self):
            raise TypeError(_AUTOCAST)
        if tracer.records():
            tracer.create_node("call_function", check_no_autocast, (current_user_line(),), {})
        return enter(self)

    def refusing(generator: Any) -> Any:
        def generate_or_refuse(*args: Any, **kwargs: Any) -> Any:
            if tracer.records():
                raise TypeError(_CHECKPOINTING)
            return generator(*args, **kwargs)

        return generate_or_refuse

    with ONE_AT_A_TIME, ExitStack() as stack:
        for name in checkpoint_generators():
            generator = getattr(checkpoint, name)
            stack.enter_context(replaced(checkpoint, name, refusing(generator), generator))
        stack.enter_context(replaced(torch.autograd.Function, "apply", classmethod(apply_or_record), apply))
        stack.enter_context(replaced(torch.autocast, "__enter__", enter_or_refuse, enter))
        stack.enter_context(torch.enable_grad())
        yield


_AUTOCAST = (
    "its forward enters torch.autocast, and a graph would compute in the dtypes of its caller. Let the "
    "Trainer's precision decide, or keep the module float that does so"
)
_CHECKPOINTING = (
    "its forward uses gradient checkpointing, and a graph would keep what it was to compute again. Switch "
    "it off (in transformers by gradient_checkpointing_disable()), or keep the module float that does so"
)


def _holds_proxy(args: Any) -> bool:
    found: list[Any] = []
    tree_map_only(fx.Proxy, found.append, args)
    return bool(found)


def _register(root: nn.Module, function: Any) -> str:
    """Registers an autograd function as a child of `root`; returns its name, the same in each trace."""
    number = 0
    while True:
        name = f"_autograd_{function.__name__}_{number}"
        known = modules_of(root).get(name)
        if known is None:
            root.add_module(name, AutogradFunction(function))
        if known is None or (isinstance(known, AutogradFunction) and known.function is function):
            return name
        number += 1


def detach_results(create: Callable[..., fx.Node], known: dict[fx.Node, fx.Node], arguments: Any) -> Any:
    """Detaches, in the arguments of a node outside `torch.no_grad()`, the results of nodes inside it.

    Args:
        create: Creates a node.
        known: For each node that was detached before, what detaches it.
        arguments: The positional and keyword arguments.
    """

    def outside(node: fx.Node) -> fx.Node:
        if not node.meta.get("no_grad"):
            return node
        if node not in known:
            known[node] = create("call_function", detached, (node,), {})
        return known[node]

    return fx.node.map_arg(arguments, outside)
