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
    """Multiplies with a weight: input and weight are rounded."""
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
    LOOKS_UP = auto()
    """Returns rows of a weight, which is rounded; the result is float. An embedding."""
    ENDS = auto()
    """A float operation whose input keeps its precision, such as a softmax."""


@dataclass(frozen=True)
class Rule:
    """How a backend computes an operation.

    Attributes:
        kind: What it does with rounded tensors.
        relu: Whether a ReLU after it is a part of it, so that the rounding follows the ReLU.
        fixed: Scale and zero point of the result for 8 bits, where they follow from the operation itself.
        float_result: Whether the kernel can return floats. The result is then rounded only where an int8
            operation reads it, and float operations after it, such as a GELU, are fused into it or read its
            full precision.
    """

    kind: Kind
    relu: bool = False
    fixed: tuple[float, int] | None = None
    float_result: bool = False


Table = dict[Any, Rule]
"""Rules by what a node calls: the class of a module, a function, or the name of a method."""


@dataclass(frozen=True)
class Target:
    """What a backend computes in int8.

    Attributes:
        rules: The table. A convolution or linear layer has the rule of its class in torch.nn.
        decomposes_attention: Whether the products of attention are int8, so that
            `scaled_dot_product_attention` becomes two products and a softmax.
        decomposes_silu: Whether a SiLU is a product with a sigmoid.
        norms_are_layers: Whether a batch-norm without a layer before it is a convolution of each channel.
        through_float: Whether a sum, a product or a concatenation computes in int8 if int8 operations read
            its result through float operations, such as a norm.
    """

    rules: Table
    decomposes_attention: bool = False
    decomposes_silu: bool = False
    norms_are_layers: bool = False
    through_float: bool = True


def rules(rule: Rule, *operations: Any) -> Table:
    """Returns a part of a table: one rule for several operations."""
    return dict.fromkeys(operations, rule)
