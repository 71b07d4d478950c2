"""Guards: nodes that check, whenever a captured graph runs, that its input takes the path of the example.

A capture follows one call. Where the forward decided by a size, a flag or the value of a tensor, the graph
holds only the branch of that call. A guard raises on an input that would take another branch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base.errors import GuardError
from qat_lightning.modes.graph.nodes import module_of

_ADVICE = (
    "Capture it with an example like this input (example_inputs=…), or keep that part float (keep_float=[…])."
)
_FOR_NUMBERS = (
    "Python needs a plain number there. Where an operation of torch takes the size itself, write x.size(0) "
    "or x.shape[0], and other sizes work. Otherwise: "
)


@fx.node.has_side_effect
def check_decision(value: Any, expected: Any, line: str) -> None:
    """Checks that a decision comes out as it did for the example.

    Args:
        value: What the forward decides by: a size, a flag, or a tensor.
        expected: The decision for the example: a bool, a number, or the nested lists of `tolist`.
        line: The user's line that decides.

    Raises:
        GuardError: It comes out differently.
    """
    found = value.tolist() if isinstance(expected, list) else type(expected)(value)
    if found != expected:
        raise GuardError(
            f"The network was captured with an example for which this line decided by {expected!r}. For this "
            f"input it is {found!r}, which may lead to a path that the graph does not hold.\n  at {line}\n"
            f"{_FOR_NUMBERS if type(expected) in (int, float) else ''}{_ADVICE}"
        )


@fx.node.has_side_effect
def check_argument(value: Any, expected: Any, name: str) -> None:
    """Checks that an argument without tensors is what it was in the example's call.

    Raises:
        GuardError: It is something else.
    """
    if value is not expected and (type(value) is not type(expected) or value != expected):
        given = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
        raise GuardError(
            f"The graph of this network holds the path of its forward for {name}={expected!r}, but it is "
            f"called with {name}={given}. Call it with {name}={expected!r}, or prepare it with an example of "
            "this call (example_inputs=…)."
        )


@fx.node.has_side_effect
def check_tensor(value: Any, expected: Any, name: str) -> None:
    """Checks that an input is a tensor of the example's number of dimensions and kind of dtype.

    Args:
        value: The input.
        expected: Number of dimensions, and whether the dtype is a floating-point one.
        name: The argument's name.

    Raises:
        GuardError: It is not.
    """
    found = (value.ndim, value.is_floating_point()) if isinstance(value, torch.Tensor) else None
    if found != tuple(expected):
        raise GuardError(
            f"The network was captured with an input {name!r} that is {_kind(expected)}, but is called with "
            f"{_kind(found) if found else repr(value)}. Call it as in the example, or capture it with an "
            "example of this call (example_inputs=…)."
        )


@fx.node.has_side_effect
def check_no_autocast(line: str) -> None:
    """Checks that a forward that switches autocast off runs without it: its graph does not switch.

    Raises:
        GuardError: Autocast is on.
    """
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise GuardError(
            "The forward of this network switches torch.autocast off, and its graph does not, so it runs in "
            f"full precision only.\n  at {line}\nTrain with precision='32-true', or keep that part float "
            "(keep_float=[…])."
        )


def _kind(facts: Any) -> str:
    dimensions, floating = facts
    return f"{'a floating-point' if floating else 'an integer or bool'} tensor of {dimensions} dimensions"


GUARDS: tuple[Any, ...] = (check_decision, check_argument, check_tensor, check_no_autocast)


class InOneMode(nn.Module):
    """A guard that concerns only training mode, or only eval mode, because the other does not decide.

    Args:
        guard: One of :data:`GUARDS`.
        training: The mode.
        facts: The guard's arguments after the value.
    """

    def __init__(self, guard: Any, training: bool, *facts: Any) -> None:
        super().__init__()
        self.guard, self.in_training, self.facts = guard, training, facts

    def forward(self, value: Any) -> None:
        if self.training is self.in_training:
            self.guard(value, *self.facts)


def is_guard(network: nn.Module, node: fx.Node) -> bool:
    """Whether `node` calls a guard."""
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), InOneMode)
    return node.op == "call_function" and node.target in GUARDS


def remove_guards(graph_module: fx.GraphModule, *, of_training: bool = False) -> None:
    """Removes guards from a graph, in place; the caller recompiles.

    Args:
        graph_module: The graph.
        of_training: Whether to remove only those that concern training mode alone. Otherwise all go, as for
            an exported file, which has no place for them.
    """
    for node in list(graph_module.graph.nodes):
        if is_guard(graph_module, node) and not (of_training and _concerns_eval(graph_module, node)):
            graph_module.graph.erase_node(node)


def _concerns_eval(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    guard: Any = module_of(graph_module, node)
    return guard is None or not guard.in_training
