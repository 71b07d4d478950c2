"""Stores an example as JSON in a recipe, so that the graph is captured again where a file is loaded.

Integers and flags, which may decide a path, are stored as they are. Of floating-point tensors the shapes are
stored; their numbers are drawn anew, the same everywhere.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from qat_lightning.base.inputs import Inputs
from qat_lightning.base.nested import PLAIN
from qat_lightning.base.torch_internals import (
    tree_leaves,
    tree_structure,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)


def store(example: Inputs) -> str | None:
    """Returns an example as JSON; None if it holds something other than tensors and plain values."""
    values = tuple(example)
    leaves = tree_leaves(values)
    if not all(isinstance(leaf, (torch.Tensor, *PLAIN)) for leaf in leaves):
        return None
    try:
        structure = treespec_dumps(tree_structure(values))
    except NotImplementedError:  # a user-defined class without a name to be found by
        return None
    return json.dumps({"structure": structure, "leaves": [_store_leaf(leaf) for leaf in leaves]})


def restore(text: str) -> Inputs:
    """Returns an example that :func:`store` stored."""
    stored = json.loads(text)
    generator = torch.Generator().manual_seed(0)
    leaves = [_restore_leaf(leaf, generator) for leaf in stored["leaves"]]
    return Inputs(*tree_unflatten(leaves, treespec_loads(stored["structure"])))


def _store_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return {"value": leaf}
    facts = {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
    return facts if leaf.is_floating_point() or leaf.is_complex() else {**facts, "numbers": leaf.tolist()}


def _restore_leaf(stored: dict[str, Any], generator: torch.Generator) -> Any:
    if "value" in stored:
        return stored["value"]
    dtype = getattr(torch, stored["dtype"])
    if "numbers" in stored:
        return torch.tensor(stored["numbers"], dtype=dtype).reshape(stored["shape"])
    return torch.randn(stored["shape"], generator=generator).to(dtype)
