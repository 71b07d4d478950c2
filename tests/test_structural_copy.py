"""A structural copy shares the tensors of a network, and nothing in it leads back to the original."""

from __future__ import annotations

import weakref
from collections import deque, namedtuple
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import prepare
from qat_lightning.modes.purity.structure import structural_copy

Call = Callable[[Tensor], Tensor]
Pair = namedtuple("Pair", ["apply", "rate"])


class Slotted:
    """Keeps the network in a slot."""

    __slots__ = ("network",)

    def __init__(self, network: Classifier) -> None:
        self.network = network

    def __call__(self, x: Tensor) -> Tensor:
        return self.network.apply_layers(x)


def _closure(network: Any) -> Call:
    return lambda x: network.apply_layers(x)


def _partial(network: Classifier) -> Call:
    return partial(Classifier.apply_layers, network)


def _tuple(network: Classifier) -> Any:
    return Pair(network.apply_layers, 0.5)


def _namespace(network: Classifier) -> Any:
    return SimpleNamespace(apply=network.apply_layers)


def _weak_proxy(network: Classifier) -> Any:
    return SimpleNamespace(apply=_closure(weakref.proxy(network)))


def _queue(network: Classifier) -> Any:
    return deque([network.apply_layers])


def _nested(network: Classifier) -> Any:
    held: list[Any] = [network.apply_layers]
    held.append(held)
    return held


WAYS = [_closure, _partial, _tuple, _namespace, _weak_proxy, _queue, _nested, Slotted, weakref.ref]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: getattr(way, "__name__", str(way)))


class Classifier(nn.Module):
    """Calls its own layers through an attribute that leads back to it."""

    def __init__(self, way: Callable[[Classifier], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)
        self.way: Any = way(self)

    def apply_layers(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.conv(x)), 0.5, self.training)

    def forward(self, x: Tensor) -> Tensor:
        way: Any = self.way
        if isinstance(way, weakref.ref):
            way = way()
        if isinstance(way, list | deque):
            way = way[0]
        call: Any = way.apply_layers if isinstance(way, nn.Module) else getattr(way, "apply", way)
        return self.head(call(x).mean((2, 3)))


@each_way
def test_a_copy_calls_its_own_modules(way: Callable[[Classifier], Any]) -> None:
    network = Classifier(way)
    copied: Any = structural_copy(network)
    called: list[nn.Module] = []
    for each in (network, copied):
        each.conv.register_forward_hook(lambda module, *_: called.append(module))
    copied.eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(copied(x), copied(x))  # the copy's mode counts, in which nothing is dropped
    assert called == [copied.conv, copied.conv]
    assert copied.conv.weight is network.conv.weight


@each_way
def test_such_a_network_is_prepared_and_keeps_its_modes(way: Callable[[Classifier], Any]) -> None:
    network = Classifier(way)
    prepared = prepare(network, backend="x86", mode="fx")
    x = torch.randn(2, 3, 8, 8)
    prepared(x)  # calibrates
    assert not torch.equal(prepared(x), prepared(x))
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))
    assert network.training
    assert vars(network)["way"] is network.way


def test_what_leads_to_no_module_is_shared() -> None:
    network = Classifier(_closure)
    shared = {"settings": SimpleNamespace(rate=0.5), "function": lambda: None, "tensor": torch.ones(2)}
    vars(network).update(shared)
    copied = structural_copy(network)
    assert all(vars(copied)[name] is value for name, value in shared.items())
