"""The vocabulary of the tables: what an operation does with rounded tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Kind(Enum):
    """What an operation does with rounded tensors.

    Operations in no table are float: they read what is there, and their result is rounded only where an int8
    operation reads it.
    """

    LAYER = auto()
    """Multiplies with a weight: input, weight and result are rounded."""
    COMPUTES = auto()
    """Reads rounded tensors, and its result is rounded with qparams of its own."""
    COMBINES = auto()
    """Does the same, if an int8 operation reads the result; else it computes in float."""
    CONCATENATES = auto()
    """Its inputs and its result share their qparams, if an int8 operation reads the result."""
    MOVES = auto()
    """Returns values of its input: the input's qparams represent the result, too."""
    AVERAGES = auto()
    """Its result is rounded with the qparams of its input."""
    READS_SHAPE = auto()
    """Reads no values."""
    ENDS = auto()
    """A float operation whose input keeps its precision, such as a softmax."""


@dataclass(frozen=True)
class Rule:
    """How a backend computes an operation.

    Attributes:
        kind: What it does with rounded tensors.
        relu: Whether a ReLU after it is a part of it, so that the rounding follows the ReLU.
        fixed: Scale and zero point of the result for 8 bits, where they follow from the operation itself.
    """

    kind: Kind
    relu: bool = False
    fixed: tuple[float, int] | None = None


Table = dict[Any, Rule]
"""Rules by what a node calls: the class of a module, a function, or the name of a method."""
