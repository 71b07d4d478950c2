"""Small modules that let a graph do one thing in training mode and another in eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate


class ByMode(nn.Module):
    """A call of `function` with one set of arguments in training mode and another in eval mode.

    Args:
        function: What both traces call.
        method: Whether `function` is the name of a method of the first argument.
        train: Positional and keyword arguments in training mode; `Slot(i)` stands for the i-th tensor.
        evaluate: The same in eval mode.
    """

    def __init__(self, function: Any, method: bool, train: Any, evaluate: Any) -> None:
        super().__init__()
        self.function, self.method = function, method
        self.train_arguments, self.eval_arguments = train, evaluate

    @classmethod
    def of(cls, node: fx.Node, args: Any, kwargs: Any) -> ByMode:
        """Makes a module that calls what `node` calls; `args` and `kwargs` are its arguments in eval mode."""
        slots: dict[fx.Node, Slot] = {n: Slot(i) for i, n in enumerate(node.all_input_nodes)}

        def with_slots(arguments: Any) -> Any:
            return map_aggregate(arguments, lambda a: slots[a] if isinstance(a, fx.Node) else a)

        train = with_slots(node.args), with_slots(node.kwargs)
        return cls(node.target, node.op == "call_method", train, (with_slots(args), with_slots(kwargs)))

    def forward(self, *tensors: Any) -> Any:
        arguments = self.train_arguments if self.training else self.eval_arguments
        args, kwargs = filled(arguments, tensors)
        if self.method:
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)


class OutputByMode(nn.Module):
    """A module that returns its first argument in training mode and its second in eval mode."""

    def forward(self, train: Any, evaluate: Any) -> Any:
        return train if self.training else evaluate


class Slot(int):
    """The place of a tensor in the stored arguments of a :class:`ByMode`."""


def filled(arguments: Any, tensors: Sequence[Any]) -> Any:
    """Returns stored arguments with the tensors in their places."""
    if isinstance(arguments, Slot):
        return tensors[arguments]
    if isinstance(arguments, tuple | list):
        return type(arguments)(filled(item, tensors) for item in arguments)
    if isinstance(arguments, dict):
        return {key: filled(item, tensors) for key, item in arguments.items()}
    return arguments


def by_mode(node: fx.Node, args: Any, kwargs: Any) -> nn.Module:
    """Returns a module that does what `node` does, with `args` and `kwargs` as its arguments in eval mode.

    A dropout becomes `nn.Dropout`, which torch.ao can carry through int8.
    """
    function: Any = node.target
    dropout = _DROPOUTS.get(function)
    if dropout is not None:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return dropout(p=bound.arguments["p"])
    return ByMode.of(node, args, kwargs)


_DROPOUTS: dict[Any, Callable[..., nn.Module]] = {
    nn.functional.dropout: nn.Dropout,
    nn.functional.dropout1d: nn.Dropout1d,
    nn.functional.dropout2d: nn.Dropout2d,
    nn.functional.dropout3d: nn.Dropout3d,
}
