"""QConfigs: the default of each backend, user-defined ones, and the fingerprints that recipes store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import (
    FakeQuantizeBase,
    QConfig,
    QConfigMapping,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
)
from torch.nn import functional as F

from qat_lightning.base.backends import BACKENDS, engine_of
from qat_lightning.base.errors import RecipeMismatchError
from qat_lightning.fake_quant.fake_quantize import EPS, OBSERVER_NAMES, OBSERVERS, FakeQuantize

QConfigLike = QConfig | QConfigMapping | str
Override = QConfig | str
Overrides = Mapping[str, Override | None]

# Backends whose kernels multiply bytes in pairs and add them in 16 bits on CPUs without VNNI: with 7 bits
# of activation the sum cannot saturate.
_SEVEN_BITS = ("x86", "fbgemm")

# torch.ao has no training module for these: int8 would round a weight that training leaves as it is.
_NOT_ROUNDED_IN_TRAINING = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)


def default_qconfig(backend: str, observer: str = "moving_average") -> QConfig:
    """Returns the QConfig that `prepare` uses: per-tensor affine activations, per-channel symmetric weights.

    Args:
        backend: x86 and fbgemm get activations of 7 bits, qnnpack and onednn of 8.
        observer: The observer of activations: `"moving_average"`, `"min_max"` or `"histogram"`. Weights need
            no choice: each step observes the whole weight anew.

    Raises:
        ValueError: There is no such observer.
    """
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {sorted(OBSERVERS)}, but received {observer!r}.")
    activation = FakeQuantize.with_args(
        observer=OBSERVERS[observer],
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


def check_qconfig(qconfig: object) -> None:
    """Raises a `TypeError` if no network can be prepared with `qconfig`."""
    if qconfig is not None and qconfig != "torch" and not isinstance(qconfig, QConfig | QConfigMapping):
        raise TypeError(
            "qconfig must be a torch.ao.quantization.QConfig, a QConfigMapping, 'torch' for PyTorch's own "
            "default, or None for the backend's default here, but received "
            f"{type(qconfig).__name__}: {qconfig!r}."
        )


def qconfig_mapping(backend: str, qconfig: QConfigLike | None) -> QConfigMapping:
    """Returns the QConfigMapping to prepare a network with, for `backend` or for a user-defined `qconfig`."""
    if isinstance(qconfig, QConfigMapping):
        return qconfig
    mapping = get_default_qat_qconfig_mapping(engine_of(backend))
    torch_default: Any = mapping.global_qconfig
    if qconfig != "torch":
        chosen = qconfig if isinstance(qconfig, QConfig) else default_qconfig(backend)
        mapping.set_global(chosen)
        # Operations with fixed (sigmoid) or shared (reshape) qparams keep PyTorch's rules.
        for kind, rule in dict(mapping.object_type_qconfigs).items():
            if rule is not None and rule.activation is torch_default.activation:
                mapping.set_object_type(kind, QConfig(chosen.activation, rule.weight))
        for kind in _NOT_ROUNDED_IN_TRAINING:
            mapping.set_object_type(kind, None)
    # torch.ao accepts only one scheme for the table of an embedding, and raises for any other.
    return mapping.set_object_type(nn.Embedding, None).set_object_type(nn.EmbeddingBag, None)


def eager_qconfigs(backend: str, qconfig: QConfigLike | None) -> dict[Any, QConfig | None]:
    """Returns the same for `torch.ao`'s eager mode: QConfigs by module name or type, the default under ''.

    Raises:
        TypeError: `qconfig` is a QConfigMapping with rules that eager mode does not support.
    """
    if not isinstance(qconfig, QConfigMapping):
        if qconfig == "torch":
            qconfig = get_default_qat_qconfig(engine_of(backend))
        default = qconfig if isinstance(qconfig, QConfig) else default_qconfig(backend)
        return {"": default, nn.Embedding: None, nn.EmbeddingBag: None}
    rules = qconfig.to_dict()
    if rules["module_name_regex"] or rules["module_name_object_type_order"]:
        raise TypeError(
            "In eager mode a QConfigMapping may hold set_global, set_object_type and set_module_name "
            "rules, but received a regex or an order rule. Use mode='fx' or name the modules."
        )
    return {"": rules[""], **dict(rules["object_type"]), **dict(rules["module_name"])}


def describe(fake_quantize: FakeQuantizeBase) -> str:
    """Describes a fake-quantize in words: observer, scheme, dtype and range of integers."""
    observer = getattr(fake_quantize, "activation_post_process", None)
    kind: Any = type(observer)
    name = OBSERVER_NAMES.get(kind, f"{kind.__module__}.{kind.__qualname__}")
    source = observer if observer is not None else fake_quantize
    low, high = getattr(source, "quant_min", None), getattr(source, "quant_max", None)
    scheme = str(getattr(source, "qscheme", None)).removeprefix("torch.")
    dtype = str(getattr(source, "dtype", None)).removeprefix("torch.")
    return f"{name} {scheme} {dtype} [{low}, {high}]"


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
    if value is not None and value not in BACKENDS and not isinstance(value, QConfig):
        raise TypeError(
            "overrides map names or globs of layers to a torch.ao.quantization.QConfig, to the name of a "
            f"backend for its default ({', '.join(BACKENDS)}), or to None to keep them float, but received "
            f"{type(value).__name__}: {value!r}."
        )


def override_qconfig(value: Override) -> QConfig:
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
                f"The layer {name!r} was prepared with a QConfig of its own, which no file stores. Pass it "
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


def _describe_qconfigs(qconfig: QConfigLike) -> Any:
    if isinstance(qconfig, QConfigMapping):
        rules = qconfig.to_dict()
        return [[str(rule), _describe_rule(value)] for rule, value in rules.items()]
    return _describe_rule(qconfig)


def _describe_rule(value: Any) -> Any:
    if isinstance(value, QConfig):
        parts = (value.activation(), value.weight())
        return [describe(part) if isinstance(part, FakeQuantizeBase) else str(part) for part in parts]
    if isinstance(value, list | tuple):
        return [_describe_rule(item) for item in value]
    return str(value)
