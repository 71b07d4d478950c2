"""QConfigs: the default of each backend, user-defined ones, and the fingerprints that recipes store."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from qat_lightning.base.backends import BACKENDS
from qat_lightning.base.errors import RecipeMismatchError
from qat_lightning.base.subclass import derives_from
from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.fake_quant.observers import EPS, OBSERVERS, observer_name
from qat_lightning.fake_quant.switches import is_fake_quantize


class QConfig(NamedTuple):
    """How a layer is quantized. `torch.ao.quantization.QConfig` has the same fields, and is accepted, too.

    Attributes:
        activation: A constructor of the fake-quantizes of activations, such as `FakeQuantize.with_args(…)`.
        weight: A constructor of the fake-quantizes of weights.
    """

    activation: Any
    weight: Any


@dataclass
class Rules:
    """Which operation has which QConfig; a `QConfigMapping` of `torch.ao` has the same attributes.

    Attributes:
        global_qconfig: The QConfig of all operations that no rule names.
        object_type_qconfigs: QConfigs by the class of a module, a function, or the name of a method.
        module_name_regex_qconfigs: QConfigs by patterns of the names of modules.
        module_name_qconfigs: QConfigs by the names of modules.
    """

    global_qconfig: QConfig
    object_type_qconfigs: dict[Any, QConfig | None] = field(default_factory=dict)
    module_name_regex_qconfigs: dict[str, QConfig | None] = field(default_factory=dict)
    module_name_qconfigs: dict[str, QConfig | None] = field(default_factory=dict)


if TYPE_CHECKING:
    from torch.ao import quantization as ao

    QConfigLike = QConfig | ao.QConfig | ao.QConfigMapping | str
    Override = QConfig | ao.QConfig | str
else:
    QConfigLike = Override = QConfig | str  # torch.ao's need no import to be accepted
Overrides = Mapping[Any, Override | None]  # by name or glob, type or function

# Backends whose kernels multiply bytes in pairs and add them in 16 bits on CPUs without VNNI: with 7 bits
# of activation the sum cannot saturate.
_SEVEN_BITS = ("x86", "fbgemm")

# Int8 would round the weights of these, which training leaves as they are.
_FLOAT = (nn.EmbeddingBag,)


def default_qconfig(backend: str, observer: str = "moving_average") -> QConfig:
    """Returns the QConfig that `prepare` uses: per-tensor affine activations, per-channel symmetric weights.

    Args:
        backend: x86 and fbgemm get activations of 7 bits, qnnpack and onednn of 8.
        observer: The observer of activations: `"moving_average"`, `"min_max"` or `"histogram"`. Weights need
            no choice: each step observes the whole weight anew.

    Raises:
        ValueError: There is no such observer.
    """
    activation = FakeQuantize.with_args(
        observer=_observer(observer),
        quant_min=0,
        quant_max=127 if backend in _SEVEN_BITS else 255,
        dtype=torch.quint8,
        qscheme=torch.per_tensor_affine,
        eps=2**-12 if backend == "qnnpack" else EPS,  # qnnpack cannot add tensors of very unequal scales
    )
    weight = FakeQuantize.with_args(
        observer=OBSERVERS["min_max_per_channel"],
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    return QConfig(activation=activation, weight=weight)


def _observer(name: str) -> Any:
    if name == "histogram":
        from qat_lightning.modes.native.torch_defaults import histogram_observer

        return histogram_observer()
    if name not in OBSERVERS:
        known = sorted((*OBSERVERS, "histogram"))
        raise ValueError(f"observer must be one of {known}, but received {name!r}.")
    return OBSERVERS[name]


def is_qconfig(value: object) -> bool:
    """Whether `value` is a QConfig, ours or `torch.ao`'s."""
    return isinstance(value, QConfig) or derives_from(value, "torch.ao.", "QConfig")


def is_mapping(value: object) -> bool:
    """Whether `value` is a QConfigMapping of `torch.ao`."""
    return derives_from(value, "torch.ao.", "QConfigMapping")


def check_qconfig(qconfig: object) -> None:
    """Raises a `TypeError` if no network can be prepared with `qconfig`."""
    if qconfig is None or qconfig == "torch" or is_qconfig(qconfig) or is_mapping(qconfig):
        return
    raise TypeError(
        "qconfig must be a torch.ao.quantization.QConfig, a QConfigMapping, 'torch' for PyTorch's own "
        "default, or None for the backend's default here, but received "
        f"{type(qconfig).__name__}: {qconfig!r}."
    )


def qconfig_mapping(backend: str, qconfig: QConfigLike | None) -> Any:
    """Returns rules to prepare a network with, for `backend` or for a user-defined `qconfig`.

    They have the attributes of :class:`Rules`.
    """
    if is_mapping(qconfig):
        return copy.deepcopy(qconfig)
    if qconfig == "torch":
        from qat_lightning.modes.native.torch_defaults import torch_mapping

        return torch_mapping(backend)
    chosen: Any = default_qconfig(backend) if qconfig is None else qconfig
    return Rules(chosen, dict.fromkeys(_FLOAT))


def describe(fake_quantize: Any) -> str:
    """Describes a fake-quantize in words: observer, scheme, dtype and range of integers."""
    observer = getattr(fake_quantize, "activation_post_process", None)
    source = observer if observer is not None else fake_quantize
    low, high = getattr(source, "quant_min", None), getattr(source, "quant_max", None)
    scheme = str(getattr(source, "qscheme", None)).removeprefix("torch.")
    dtype = str(getattr(source, "dtype", None)).removeprefix("torch.")
    return f"{observer_name(observer)} {scheme} {dtype} [{low}, {high}]"


def qconfig_name(qconfig: QConfigLike | None) -> str:
    """Returns what a recipe stores of a qconfig: `"default"`, `"torch"`, or a fingerprint.

    The functions in a user-defined qconfig cannot be stored as JSON, so that it must be passed again. Its
    fingerprint, a hash of the fake-quantizes that it makes, shows whether it is the same.
    """
    if qconfig is None:
        return "default"
    if isinstance(qconfig, str):
        return qconfig
    text = json.dumps(_describe_qconfigs(qconfig), sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def check_override(value: object) -> None:
    """Raises a `TypeError` if no single layer can be prepared with `value`."""
    if value is not None and value not in BACKENDS and not is_qconfig(value):
        raise TypeError(
            "overrides map names or globs of layers, types or functions to a QConfig, to the name of a "
            f"backend for its default ({', '.join(BACKENDS)}), or to None to keep them float, but received "
            f"{type(value).__name__}: {value!r}."
        )


def override_qconfig(value: Override) -> Any:
    """Returns the QConfig of an override, which may be the name of a backend."""
    return default_qconfig(value) if isinstance(value, str) else value


def stored_overrides(stored: Mapping[str, str], given: Overrides) -> dict[str, Override]:
    """Returns the overrides to prepare with again, for a recipe that stores `stored`.

    Raises:
        RecipeMismatchError: One of them was a user-defined QConfig, and `given` does not contain it.
    """
    found: dict[str, Override] = {}
    for name, value in stored.items():
        override = value if value in BACKENDS else given.get(name)
        if override is None or qconfig_name(override) != value:
            raise RecipeMismatchError(
                f"{name!r} was prepared with a QConfig of its own, which no file stores. Pass it "
                f"again as overrides={{{name!r}: …}}; received {override!r}."
            )
        found[name] = override
    return found


def stored_qconfig(name: str, qconfig: QConfigLike | None) -> QConfigLike | None:
    """Returns the qconfig to prepare with again, for a recipe that stores `name`.

    Raises:
        RecipeMismatchError: It was a user-defined one, and `qconfig` differs from it.
    """
    if qconfig is None and name == "torch":
        return name
    if qconfig_name(qconfig) != name:
        raise RecipeMismatchError(
            "A network prepared with a user-defined QConfig needs that QConfig again, since no file stores "
            f"it. This one was prepared with {name!r}, but received {qconfig_name(qconfig)!r}. Pass it as "
            "qconfig=…."
        )
    return qconfig


def _describe_qconfigs(qconfig: Any) -> Any:
    if is_mapping(qconfig):
        rules = qconfig.to_dict()
        return [[str(rule), _describe_rule(value)] for rule, value in rules.items()]
    return _describe_rule(qconfig)


def _describe_rule(value: Any) -> Any:
    if is_qconfig(value):
        parts = (value.activation(), value.weight())
        return [describe(part) if is_fake_quantize(part) else str(part) for part in parts]
    if isinstance(value, list | tuple):
        return [_describe_rule(item) for item in value]
    return str(value)
