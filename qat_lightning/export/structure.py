"""Describes how tuples, lists and dicts nest a network's output tensors, so that a file can store it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qat_lightning.base.torch_internals import (
    tree_leaves,
    tree_structure,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

STRUCTURE_KEY = "qat_lightning.outputs"


def tensors_of(values: Any) -> list[torch.Tensor]:
    """Returns the tensors in nested values, in the file's order."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def structure_of(outputs: Any) -> str:
    """Returns the structure as JSON; empty if it holds user-defined classes or values other than tensors."""
    if len(tensors_of(outputs)) != len(tree_leaves(outputs)):
        return ""
    try:
        return treespec_dumps(tree_structure(outputs))
    except NotImplementedError:
        return ""


def restore(tensors: Sequence[torch.Tensor], structure: str | None) -> Any:
    """Puts tensors into their structure. Without a structure, returns the only tensor, or a tuple."""
    if structure:
        return tree_unflatten(tensors, treespec_loads(structure))
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
