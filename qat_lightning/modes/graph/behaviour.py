"""Carries attributes of the original network over to its graph module, and explains what is lost.

A graph module has the modules of the original under their names, but none of its plain attributes and no
method except `forward`. The attributes are carried over. The methods cannot be: they would run the layers of
the original instead of the prepared ones. Calling one raises an error that names the method and the fix.
"""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

from torch import fx, nn

from qat_lightning.base.torch_internals import (
    buffers_of,
    is_persistent,
    modules_of,
    parameters_of,
    preserved_attributes,
)

_OWN = frozenset(vars(nn.Module())) | frozenset(dir(fx.GraphModule))


class LostMethod:
    """A stand-in for a method of the original network; calling it raises an error that says what to do."""

    def __init__(self, network: str, method: str) -> None:
        self.network, self.method = network, method

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AttributeError(
            f"{self.network} was traced into a graph for quantization, and a graph has only `forward`: "
            f"its method {self.method!r} is gone. Move the call into a submodule's `forward` and "
            'quantize that submodule instead, as in modules=["model.features"].'
        )


class LostForward(nn.Module):
    """A stand-in for a container of the original network, with its layers but without its `forward`."""

    def __init__(self, network: str, path: str, fix: str | None = None) -> None:
        super().__init__()
        self._network, self._path = network, path
        self._fix = fix or f'Quantize that part instead of the whole, as in modules=["model.{path}"].'

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AttributeError(
            f"{self._network} was traced into one graph for quantization, so its part {self._path!r} "
            f"cannot be called by itself. {self._fix}"
        )


def attributes(network: nn.Module) -> dict[str, Any]:
    """Returns the plain attributes of `network` and its class, and a :class:`LostMethod` for each method."""
    kept: dict[str, Any] = {}
    for cls in reversed(type(network).__mro__):
        if issubclass(cls, nn.Module) and not cls.__module__.startswith("torch.nn."):
            for name, value in vars(cls).items():
                if inspect.isfunction(value):
                    kept[name] = LostMethod(type(network).__name__, name)
                elif not hasattr(value, "__get__"):
                    kept[name] = value
    kept.update(vars(network))
    return {name: value for name, value in kept.items() if _is_carried(name, network)}


def unused_state(network: nn.Module, graph_module: fx.GraphModule) -> dict[str, Any]:
    """Returns the layers, parameters and buffers of `network` that its forward, and so its graph, ignores."""
    buffers = {
        name: nn.Buffer(value, persistent=is_persistent(network, name))
        for name, value in buffers_of(network).items()
        if value is not None
    }
    state = {**modules_of(network), **parameters_of(network), **buffers}
    return {name: value for name, value in state.items() if not _is_used(graph_module, name)}


def _is_carried(name: str, network: nn.Module) -> bool:
    return name not in _OWN and not name.startswith("__") and name not in modules_of(network)


def _is_used(graph_module: fx.GraphModule, name: str) -> bool:
    """Whether the graph itself uses a module, a parameter or a buffer of that name."""
    state = (modules_of(graph_module), parameters_of(graph_module), buffers_of(graph_module))
    return any(name in part for part in state)


def attach(graph_module: fx.GraphModule, kept: dict[str, Any]) -> None:
    """Sets the attributes on a graph module, and in its `meta`, from which a deep copy takes them."""
    kept = {name: value for name, value in kept.items() if not _is_used(graph_module, name)}
    preserved_attributes(graph_module).update(kept)
    for name, value in kept.items():
        setattr(graph_module, name, value)


def attached(graph_module: fx.GraphModule) -> dict[str, Any]:
    """Returns the attributes that :func:`attach` set."""
    kept = preserved_attributes(graph_module)
    return {name: getattr(graph_module, name, value) for name, value in kept.items()}


def mark_containers(graph_module: fx.GraphModule, network: str, fix: str | None = None) -> None:
    """Replaces the graph module's containers, which have no forward, by ones whose `forward` says so."""
    for path, module in list(graph_module.named_modules()):
        if type(module) is nn.Module:
            container = LostForward(network, path, fix)
            container.training = module.training
            for name, child in module.named_children():
                container.add_module(name, child)
            for name, parameter in module.named_parameters(recurse=False):
                container.register_parameter(name, parameter)
            for name, buffer in module.named_buffers(recurse=False):
                container.register_buffer(name, buffer)
            parent, _, leaf = path.rpartition(".")
            modules_of(graph_module.get_submodule(parent))[leaf] = container
