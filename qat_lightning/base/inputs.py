"""Catches the inputs that networks are called with, by forward pre-hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from qat_lightning.base.nested import map_tensors, tensors_in


class Inputs(NamedTuple):
    """The positional and keyword arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BatchInputs(Inputs):
    """The arguments of a call on one batch among many. In others, the values of tensors differ."""


class Catcher:
    """Copies the first samples of each network's first call to the CPU.

    Args:
        networks: The networks whose inputs to catch.
        samples: How many samples to keep. The default is enough for batch-norm, and quick to run on the CPU.

    Attributes:
        caught: The inputs of each network that was called.
    """

    def __init__(self, networks: Iterable[nn.Module], *, samples: int = 2) -> None:
        self.samples = samples
        self.caught: dict[nn.Module, Inputs] = {}
        self._handles = [n.register_forward_pre_hook(self._catch, with_kwargs=True) for n in networks]

    def __enter__(self) -> Catcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def named(self, networks: Mapping[str, nn.Module]) -> dict[str, Inputs]:
        """Returns the inputs of those of `networks` that were called, by their names."""
        return {name: self.caught[n] for name, n in networks.items() if n in self.caught}

    def _catch(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if network not in self.caught and not is_redirected(network):
            self.caught[network] = BatchInputs(*first_samples((args, kwargs), self.samples))


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of the parameters of `module`."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def is_redirected(network: nn.Module) -> bool:
    """Returns whether a call currently runs something other than `forward`.

    Under DDP, Lightning redirects `forward` to `training_step`.
    """
    forward = vars(network).get("forward")
    return forward is not None and getattr(forward, "__self__", None) is not network


def first_samples(values: Any, samples: int = 2) -> Any:
    """Copies nested `values` to the CPU, and cuts every tensor with the batch size to its first samples.

    The batch size is the first dimension of the first tensor.
    """
    shapes = [tensor.shape for tensor in tensors_in(values) if tensor.ndim]
    size = shapes[0][0] if shapes else 0

    def copied(value: torch.Tensor) -> torch.Tensor:
        batched = value.ndim > 0 and value.shape[0] == size
        return (value.detach()[:samples] if batched else value.detach()).cpu().clone()

    return map_tensors(values, copied)


def arguments_of(network: nn.Module, inputs: Inputs) -> Any:
    """Returns the inputs by name if the network's `forward` names them all, else the positional ones."""
    bound = inspect.signature(network.forward).bind(*inputs.args, **inputs.kwargs)
    named = all(p.kind is not p.VAR_POSITIONAL for p in bound.signature.parameters.values())
    return dict(bound.arguments) if named else inputs.args
