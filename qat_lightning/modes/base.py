"""What a mode of quantization is: the interface behind `mode="eager"` and `mode="fx"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import nn

from qat_lightning.modes.qconfig import Override, QConfigLike


@dataclass(frozen=True)
class Options:
    """What to prepare a network with; every name in it is resolved.

    Attributes:
        backend: One of :data:`qat_lightning.base.backends.BACKENDS`.
        qconfig: One's own QConfig or QConfigMapping, or None for the backend's default.
        keep_float: Names of the submodules, and of the functions (`"operator.add()"`), that stay float.
        fuse: `"auto"`, or groups of module names (eager mode only).
        overrides: QConfigs of single layers, by name.
        replace_relu6: Whether ReLU6 becomes ReLU.
        untraceable: `"error"` or `"float"`: what happens to parts that cannot be traced (fx mode only).
        example_inputs: What `forward` takes, or None (eager mode only).
    """

    backend: str
    qconfig: QConfigLike | None = None
    keep_float: tuple[str, ...] = ()
    fuse: str | Sequence[Sequence[str]] = "auto"
    replace_relu6: bool = True
    overrides: Mapping[str, Override] = field(default_factory=dict)
    untraceable: str = "error"
    example_inputs: tuple[Any, ...] | None = None


class ModeResult(NamedTuple):
    """What a mode makes of a float network.

    Attributes:
        network: The prepared network.
        untraceable: Name and line of each part that could not be traced and stays float.
        relu6: How many ReLU6 became ReLU.
    """

    network: nn.Module
    untraceable: tuple[str, ...] = ()
    relu6: int = 0


class Mode(Protocol):
    """How a float network becomes a prepared one, and that an int8 one."""

    name: str

    def check(self, network: nn.Module, options: Options) -> Options:
        """Raises if the mode cannot prepare `network`. Changes nothing.

        Returns:
            `options` with what was found out on the way, so that the same can be prepared from a recipe.
        """

    def functions(self, network: nn.Module, untraceable: str) -> frozenset[str] | None:
        """Names of the functions that `network` calls; None where the mode has no graph to tell from."""

    def prepare(self, network: nn.Module, options: Options) -> ModeResult:
        """Fuses `network` and inserts fake-quantization. The result may share its modules."""

    def convert(self, prepared: nn.Module) -> nn.Module:
        """Converts a prepared network, in eval mode on the CPU, in place or into a new one."""
