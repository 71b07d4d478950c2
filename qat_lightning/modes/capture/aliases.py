"""Notices writes through one view of a tensor that are read through another, which a graph cannot follow.

A graph's operations return new tensors. A write, such as `x[0] = 1` or `x += 1`, gives the proxy of `x` a new
node; a view that was taken before, and for a write through a view its base, still stand for the old values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from qat_lightning.base.torch_internals import base_of


class Aliases:
    """Which nodes stand for views of the same memory, and which of them are out of date."""

    def __init__(self) -> None:
        self._nodes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # from a base to the nodes of its memory
        self._stale: set[fx.Node] = set()
        self._views: dict[fx.Node, fx.Node] = {}  # from a node that was written to a view to that view

    def made(self, node: fx.Node, value: object) -> None:
        """Notes the tensor that a node stands for."""
        if isinstance(value, torch.Tensor):
            self._nodes.setdefault(base_of(value), []).append(node)

    def written(self, node: fx.Node, value: torch.Tensor) -> None:
        """Notes that the tensor of `node` is written to: the other nodes of its memory are out of date."""
        self._stale.update(other for other in self._nodes.get(base_of(value), ()) if other is not node)

    def wrote(self, view: fx.Node, new: fx.Node) -> None:
        """Notes that `new` is what was written to the memory of the node `view`."""
        self._views[new] = view

    def settle(self, base: fx.Node, key: Any, value: object) -> None:
        """Lets `base` be read again if `base[key] = value` completes `base[key] += …`.

        Python reads the item, writes to this view, and assigns it.
        """
        view = self._views.get(value) if isinstance(value, fx.Node) else None
        if view is not None and view.target is operator.getitem and view.args == (base, key):
            self._stale.discard(base)

    def check(self, node: fx.Node) -> None:
        """Raises `TypeError` if a node that is read is out of date."""
        if node in self._stale:
            raise TypeError(
                "its forward writes to a tensor and then reads the same memory through another view, which a "
                "graph cannot follow. Write to a copy (x.clone()), or take the view afterwards"
            )
