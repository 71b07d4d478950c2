"""What a network returns, as a file remembers it: tuples, lists and dicts of tensors around flat outputs."""

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
    """The tensors in nested values, in the order in which a file has them."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def structure_of(outputs: Any) -> str:
    """The structure as JSON; empty where there is more in it than tensors, or a class of one's own."""
    if len(tensors_of(outputs)) != len(tree_leaves(outputs)):
        return ""
    try:
        return treespec_dumps(tree_structure(outputs))
    except NotImplementedError:
        return ""


def restore(tensors: Sequence[torch.Tensor], structure: str | None) -> Any:
    """The tensors in their structure; where none is known, one tensor as it is and several as a tuple."""
    if structure:
        return tree_unflatten(tensors, treespec_loads(structure))
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
