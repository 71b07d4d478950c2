"""The interface of a quantization mode, which `mode="eager"` and `mode="fx"` implement."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import nn

from qat_lightning.base.inputs import Inputs
from qat_lightning.modes.qconfig import Override, QConfigLike


@dataclass(frozen=True)
class Options:
    """The options of `prepare`, with every name or glob resolved to names of the network.

    Attributes:
        backend: One of :data:`qat_lightning.base.backends.BACKENDS`.
        qconfig: A user-defined QConfig or QConfigMapping, `"torch"` for PyTorch's default, or None for the
            backend's default here.
        keep_float: Names of the submodules, and of the functions (`"operator.add()"`), that stay float.
        fuse: `"auto"`, or groups of module names (eager mode only).
        overrides: QConfigs of single layers, other modules and functions, by name.
        operations: What modules and functions are declared to do, by name (fx mode only).
        replace_relu6: Whether ReLU6 becomes ReLU.
        untraceable: `"error"` or `"float"`: how to treat parts that cannot be traced (fx mode only).
        example_inputs: An example of a call of `forward`, or None.
    """

    backend: str
    qconfig: QConfigLike | None = None
    keep_float: tuple[str, ...] = ()
    fuse: str | Sequence[Sequence[str]] = "auto"
    replace_relu6: bool = True
    overrides: Mapping[str, Override] = field(default_factory=dict)
    operations: Mapping[str, str] = field(default_factory=dict)
    untraceable: str = "error"
    example_inputs: Inputs | None = None


class ModeResult(NamedTuple):
    """The result of preparing a float network.

    Attributes:
        network: The prepared network.
        untraceable: Name and line of each part that could not be traced and stays float.
        relu6: Number of ReLU6 that became ReLU.
        captured: The example that the graph was captured from; None for any other way.
    """

    network: nn.Module
    untraceable: tuple[str, ...] = ()
    relu6: int = 0
    captured: Inputs | None = None


class Mode(Protocol):
    """A way to turn a float network into a prepared one, and a prepared one into an int8 one."""

    name: str

    def check(self, network: nn.Module, options: Options) -> Options:
        """Raises if the mode cannot prepare `network`. Changes nothing.

        Returns:
            `options`, with the results of the check, such as the groups to fuse, filled in. A recipe that
            stores them prepares the same network again.
        """

    def functions(
        self, network: nn.Module, untraceable: str, example: Inputs | None, declared: frozenset[str]
    ) -> frozenset[str] | None:
        """Returns the names of the functions that `network` calls; None if the mode has no graph.

        Args:
            network: The float network.
            untraceable: How to treat parts that cannot be traced.
            example: An example of a call of `forward`, or None.
            declared: Names of the modules and functions that are one call each.
        """

    def prepares_in_place(self, network: nn.Module) -> bool:
        """Returns whether the prepared network has to be `network` itself."""

    def prepare(self, network: nn.Module, options: Options) -> ModeResult:
        """Fuses `network` and inserts fake-quantizes. The result may share modules with `network`."""

    def convert(self, prepared: nn.Module, unseen: Collection[str], lowering: str) -> nn.Module:
        """Converts a prepared network, which is in eval mode on the CPU, in place or into a new one.

        Args:
            prepared: The network.
            unseen: Names of the fake-quantizes that saw no floating-point data, and so round nothing.
            lowering: `"plain"` for plain tensors of bytes, or `"native"` for PyTorch's quantized tensors.
        """
