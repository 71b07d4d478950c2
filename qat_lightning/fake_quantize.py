"""The fake-quantize modules of a prepared network: which there are, what they do, what grid they are on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
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
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

from qat_lightning.errors import ConversionError

OBSERVERS: dict[str, type[nn.Module]] = {
    "moving_average": MovingAverageMinMaxObserver,
    "moving_average_per_channel": MovingAveragePerChannelMinMaxObserver,
    "min_max": MinMaxObserver,
    "min_max_per_channel": PerChannelMinMaxObserver,
    "histogram": HistogramObserver,
}
_OBSERVER_NAMES = {observer: name for name, observer in OBSERVERS.items()}

QConfigLike = QConfig | QConfigMapping


def check_qconfig(qconfig: object) -> None:
    """Raises a `TypeError` if `qconfig` is neither None nor something `torch.ao` accepts."""
    if qconfig is not None and not isinstance(qconfig, QConfig | QConfigMapping):
        raise TypeError(
            "qconfig must be a torch.ao.quantization.QConfig, a QConfigMapping, or None for the "
            f"backend's default, but received {type(qconfig).__name__}: {qconfig!r}."
        )


def qconfig_mapping(backend: str, qconfig: QConfigLike | None) -> QConfigMapping:
    """The QConfigMapping that prepares a network for `backend`, or for one's own `qconfig`."""
    if isinstance(qconfig, QConfigMapping):
        return qconfig
    if qconfig is not None:
        mapping = QConfigMapping().set_global(qconfig)
    else:
        mapping = get_default_qat_qconfig_mapping(backend)
    # An embedding's table has a scheme of its own, and `torch.ao` raises at any other.
    return mapping.set_object_type(nn.Embedding, None).set_object_type(nn.EmbeddingBag, None)


def eager_qconfigs(backend: str, qconfig: QConfigLike | None) -> dict[Any, QConfig | None]:
    """The same for `torch.ao`'s eager mode: QConfigs by module name or type, the default under ''.

    Raises:
        TypeError: `qconfig` is a QConfigMapping with rules that eager mode has no place for.
    """
    if not isinstance(qconfig, QConfigMapping):
        default = qconfig or get_default_qat_qconfig(backend)
        return {"": default, nn.Embedding: None, nn.EmbeddingBag: None}
    rules = qconfig.to_dict()
    if rules["module_name_regex"] or rules["module_name_object_type_order"]:
        raise TypeError(
            "In eager mode a QConfigMapping may hold set_global, set_object_type and "
            "set_module_name rules, but received a regex or an order rule. Use mode='fx' or name "
            "the modules."
        )
    return {"": rules[""], **dict(rules["object_type"]), **dict(rules["module_name"])}


def fake_quantizes(module: nn.Module) -> Iterator[tuple[str, FakeQuantizeBase]]:
    """Yields the name and the module of every fake-quantize inside `module`, each once."""
    for name, child in module.named_modules():
        if isinstance(child, FakeQuantizeBase):
            yield name, child


def set_enabled(module: nn.Module, *, observer: bool, fake_quant: bool) -> None:
    """Switches the observers and the rounding of every fake-quantize inside `module`."""
    for _, child in fake_quantizes(module):
        child.observer_enabled.fill_(int(observer))
        child.fake_quant_enabled.fill_(int(fake_quant))


def freeze_bn_statistics(module: nn.Module, *, frozen: bool) -> None:
    """Freezes or releases the statistics of every batch-norm inside a `module` in training.

    That is a Python attribute in the fused modules, absent from the state dict, and the mode of a
    batch-norm that was not fused.
    """
    inside_fused = set()
    for child in module.modules():
        if hasattr(child, "freeze_bn_stats"):
            inside_fused.add(child.bn)
            if child.freeze_bn != frozen:
                child.freeze_bn_stats() if frozen else child.update_bn_stats()
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child not in inside_fused:
            child.train(not frozen and module.training)


class ObserversOff:
    """Switches observers off and back to exactly what each was, for the loops that only evaluate."""

    def __init__(self) -> None:
        self._flags: dict[FakeQuantizeBase, torch.Tensor] = {}

    def enter(self, module: nn.Module) -> None:
        """Remembers each observer's flag, then switches it off. Entered twice, the first counts."""
        for _, child in fake_quantizes(module):
            if child not in self._flags:
                self._flags[child] = child.observer_enabled.clone()
            child.observer_enabled.zero_()

    def leave(self) -> None:
        """Restores the flags that `enter` remembered."""
        for child, flag in self._flags.items():
            child.observer_enabled.copy_(flag)
        self._flags.clear()


def has_range(fake_quantize: FakeQuantizeBase) -> bool:
    """Whether its observer follows a minimum and a maximum; one of fixed parameters does not."""
    return hasattr(getattr(fake_quantize, "activation_post_process", None), "min_val")


def is_moving_average(fake_quantize: FakeQuantizeBase) -> bool:
    """Whether its observer averages over batches, rather than keeping the extremes."""
    return getattr(fake_quantize.activation_post_process, "averaging_constant", 1) != 1


def set_range(fake_quantize: FakeQuantizeBase, low: torch.Tensor, high: torch.Tensor) -> None:
    """Sets what its observer has seen, and the scale and zero point that follow from it."""
    observer = fake_quantize.activation_post_process
    for buffer, value in ((observer.min_val, low), (observer.max_val, high)):
        if buffer.numel() != value.numel():
            buffer.resize_(value.shape)
        buffer.copy_(value.view(buffer.shape))
    scale, zero_point = fake_quantize.calculate_qparams()
    fake_quantize.scale.resize_(scale.shape).copy_(scale)
    fake_quantize.zero_point.resize_(zero_point.shape).copy_(zero_point)


def has_seen_data(fake_quantize: FakeQuantizeBase) -> bool:
    """Whether a tensor has passed its observer."""
    low = fake_quantize.activation_post_process.min_val
    return bool(low.numel() and torch.isfinite(low).all())


def describe(fake_quantize: FakeQuantizeBase) -> str:
    """The grid of one fake-quantize in words: observer, scheme, dtype and range of integers."""
    observer = getattr(fake_quantize, "activation_post_process", None)
    kind = type(observer)
    name = _OBSERVER_NAMES.get(kind, f"{kind.__module__}.{kind.__qualname__}")
    source = observer if observer is not None else fake_quantize
    low, high = getattr(source, "quant_min", None), getattr(source, "quant_max", None)
    scheme = str(getattr(source, "qscheme", None)).removeprefix("torch.")
    dtype = str(getattr(source, "dtype", None)).removeprefix("torch.")
    return f"{name} {scheme} {dtype} [{low}, {high}]"


def fingerprint(qconfig: QConfigLike) -> str:
    """A short hash of what a QConfig or QConfigMapping makes, equal for equal ones.

    The functions inside a QConfig cannot be stored as JSON, so a recipe stores this instead and the
    QConfig itself has to be passed again.
    """
    text = json.dumps(_describe_qconfigs(qconfig), sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


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


def check_observed(module: nn.Module) -> list[str]:
    """Names the activation fake-quantizes inside a prepared `module` that never saw data.

    Raises:
        ConversionError: None of them saw any: there is no range to convert with.
    """
    activations = {
        name: child
        for name, child in fake_quantizes(module)
        if not name.endswith("weight_fake_quant") and has_range(child)
    }
    unseen = [name for name, child in activations.items() if not has_seen_data(child)]
    if activations and len(unseen) == len(activations):
        raise ConversionError(
            "A prepared network can be converted once its observers have seen data, but no batch "
            "has passed through it in training mode. Train it for at least one step, or load a "
            "checkpoint of a QAT run."
        )
    return unseen
