"""The options for preparing a network, shared by all functions and callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from qat_lightning.base.backends import check_backend
from qat_lightning.base.errors import nearest
from qat_lightning.modes import check_mode, check_untraceable
from qat_lightning.modes.qconfig import Overrides, QConfigLike, check_qconfig
from qat_lightning.modes.targets.declared import check_operations
from qat_lightning.quantize.patterns import Pattern
from qat_lightning.quantize.selection import Operations


class PrepareOptions(TypedDict, total=False):
    """The keyword arguments that decide how a network is prepared. All are optional.

    Attributes:
        backend: Engine of the int8 network: `"x86"` (default), `"fbgemm"`, `"qnnpack"` or `"onednn"`. x86 and
            fbgemm use 7 bits for activations, so sums do not overflow on CPUs without VNNI. onednn and
            qnnpack use 8 bits, which is more accurate on CPUs with VNNI. Or the runtime of the exported file:
            `"onnxruntime"` or `"openvino"`, with 8 bits. PyTorch then runs the int8 network on onednn, and
            computes layers whose result stays float in float.
        qconfig: Your own :class:`qat_lightning.QConfig` instead of the backend's default, or a `QConfig` or
            `QConfigMapping` of `torch.ao.quantization`. `"torch"` for PyTorch's own default.
        mode: `"fx"` traces the network and finds additions, functional calls and fusions by itself. `"eager"`
            runs the network's own code, with the QuantStubs that its author wrote. `"auto"` (default) is
            eager if the network holds QuantStubs, else fx.
        keep_float: Names, globs or types of submodules that stay float. Names are relative to the network. A
            type may be given by name, as `"torch.nn.GELU"`. In fx mode also functions, such as `torch.matmul`
            or, by name, `"torch.matmul()"`: every call stays float.
        fuse: `"auto"` (default), or in eager mode groups of module names, as `fuse_modules_qat` takes them.
            `"auto"` finds fusions in the graph of the network. In eager mode the network's own `fuse_model`
            runs first. If a network cannot be traced, one forward pass on example inputs finds the fusions.
        replace_relu6: Whether ReLU6 becomes ReLU, which int8 fuses into the layer before it. Default: True.
        overrides: QConfigs by name or type (the module, or the convolutions and linear layers in it), by glob
            (the layers in it), or in fx mode by function, as in `keep_float`. A value is a
            `QConfig`, the name of a backend for that backend's default, or None for float. Where several
            match, the last decides.
        operations: What operations do with rounded tensors, by name or glob, type or function: user-defined
            ones, or those for which the backend's rules are not what you want. `"moves"`: returns values of
            its input, whose qparams represent the result, too. `"averages"`: its result is rounded with the
            qparams of its input. `"computes"`: reads rounded tensors, and its result is rounded with qparams
            of its own. `"float"`: reads its input in full precision. `"rows"`: an `nn.Embedding` whose weight
            trains rounded, with a scale for each row, and is stored as int8; its result is float. Each is one
            call in the graph, which no trace looks into. Only in fx mode.
        untraceable: What happens in fx mode to a submodule whose forward cannot be traced. `"error"`
            (default) raises an error with its file and line. `"float"` keeps the smallest such submodules
            float and logs their names.
    """

    backend: str
    qconfig: QConfigLike | None
    mode: str
    keep_float: Sequence[Pattern]
    fuse: str | Sequence[Sequence[str]]
    replace_relu6: bool
    overrides: Overrides | None
    operations: Operations | None
    untraceable: str


class ModuleOptions(PrepareOptions, total=False):
    """:class:`PrepareOptions`, and the networks in a module to which they apply.

    Attributes:
        modules: Dotted names of the submodules to quantize. By default every child that is a network (a
            container with convolutions or linear layers).
    """

    modules: Sequence[str] | None


@dataclass(frozen=True)
class Settings:
    """:class:`ModuleOptions` with defaults filled in and values checked.

    Raises:
        ValueError: A value is out of range, or an engine is missing from this build of PyTorch.
        TypeError: A value is of the wrong type.
    """

    backend: str = "x86"
    qconfig: QConfigLike | None = None
    mode: str = "auto"
    modules: Sequence[str] | None = None
    keep_float: Sequence[Pattern] = ()
    fuse: str | Sequence[Sequence[str]] = "auto"
    replace_relu6: bool = True
    overrides: Overrides | None = None
    operations: Operations | None = None
    untraceable: str = "error"

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_qconfig(self.qconfig)
        check_mode(self.mode)
        check_untraceable(self.untraceable)
        check_operations(self.operations)
        for name in ("modules", "keep_float"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name} must be a list, but received {value!r}. Pass [{value!r}].")
        if self.modules is not None and (not self.modules or len(set(self.modules)) < len(self.modules)):
            raise ValueError(
                "modules must name at least one submodule, each once, or be None for all networks, but "
                f"received {list(self.modules)}."
            )

    @classmethod
    def of(cls, options: Mapping[str, Any], caller: str, *, one_network: bool = False) -> Settings:
        """Completes and checks the keyword arguments of `caller`.

        Args:
            options: What `caller` received as `**options`.
            caller: The caller's name, for the message.
            one_network: Whether the caller takes a single network, and so no `modules`.

        Raises:
            TypeError: An option is unknown, or a value is of the wrong type.
            ValueError: A value is out of range.
        """
        known = (PrepareOptions if one_network else ModuleOptions).__annotations__
        for name in options:
            if name not in known:
                raise TypeError(f"{caller} takes no argument {name!r}. {nearest(name, known)}")
        return cls(**options)

    @property
    def options(self) -> PrepareOptions:
        """The options that :func:`qat_lightning.prepare` takes: all but `modules`."""
        return cast(PrepareOptions, {name: getattr(self, name) for name in PrepareOptions.__annotations__})
