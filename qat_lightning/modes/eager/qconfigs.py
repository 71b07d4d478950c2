"""The QConfigs of `torch.ao`'s eager mode: by module name or type, the default under ''."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.ao.quantization import QConfig

from qat_lightning.modes.native.torch_defaults import torch_qconfig
from qat_lightning.modes.qconfig import Override, QConfigLike, default_qconfig, is_mapping, override_qconfig


def eager_qconfigs(backend: str, qconfig: QConfigLike | None) -> dict[Any, QConfig | None]:
    """Returns the QConfigs for `backend`, or for a user-defined `qconfig`.

    Raises:
        TypeError: `qconfig` is a QConfigMapping with rules that eager mode does not support.
    """
    mapping: Any = qconfig
    if not is_mapping(mapping):
        return {"": _default(backend, qconfig), nn.Embedding: None, nn.EmbeddingBag: None}
    rules = mapping.to_dict()
    if rules["module_name_regex"] or rules["module_name_object_type_order"]:
        raise TypeError(
            "In eager mode a QConfigMapping may hold set_global, set_object_type and set_module_name "
            "rules, but received a regex or an order rule. Use mode='fx' or name the modules."
        )
    return {"": rules[""], **dict(rules["object_type"]), **dict(rules["module_name"])}


def eager_override(value: Override) -> QConfig:
    """Returns the QConfig of an override."""
    return QConfig(*override_qconfig(value))


def _default(backend: str, qconfig: Any) -> QConfig:
    if qconfig == "torch":
        return torch_qconfig(backend)
    return QConfig(*(default_qconfig(backend) if qconfig is None else qconfig))
