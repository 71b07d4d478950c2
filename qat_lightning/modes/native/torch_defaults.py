"""What a user may choose instead of the defaults: PyTorch's QConfigs, and its observer with a histogram."""

from __future__ import annotations

from torch import nn
from torch.ao.quantization import (
    QConfig,
    QConfigMapping,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
)
from torch.ao.quantization.observer import HistogramObserver

from qat_lightning.base.backends import engine_of


def torch_mapping(backend: str) -> QConfigMapping:
    """Returns PyTorch's QConfigMapping for `backend`, for `qconfig="torch"` in fx mode.

    Embeddings stay float: torch.ao accepts only one scheme for their tables, and raises for any other.
    """
    mapping = get_default_qat_qconfig_mapping(engine_of(backend))
    return mapping.set_object_type(nn.Embedding, None).set_object_type(nn.EmbeddingBag, None)


def torch_qconfig(backend: str) -> QConfig:
    """Returns PyTorch's QConfig for `backend`, for `qconfig="torch"` in eager mode."""
    return get_default_qat_qconfig(engine_of(backend))


def histogram_observer() -> type[nn.Module]:
    """Returns the observer that chooses the range with the smallest error of rounding."""
    return HistogramObserver
