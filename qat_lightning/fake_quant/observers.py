"""Observers: each holds the range of a tensor, and the rule by which the range follows the next tensor.

`FakeQuantize` does the observing. It also takes the observers of `torch.ao`. Ours have the same buffers,
attributes and arguments, so that files fit both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qat_lightning.base.subclass import derives_from
from qat_lightning.fake_quant.constructors import Constructible

EPS = float(torch.finfo(torch.float32).eps)
"""The smallest scale, as in `torch.ao`: int8 kernels cannot requantize with a far smaller one."""
_SIGNED = (torch.qint8, torch.int8)


def resize_buffers(
    module: nn.Module, names: tuple[str, ...], state_dict: dict[str, Any], prefix: str
) -> None:
    """Gives buffers the sizes that they are about to load: those of channels have none before any tensor."""
    for name in names:
        stored = state_dict.get(prefix + name)
        if stored is not None:
            getattr(module, name).resize_(stored.shape)


class Observer(Constructible, nn.Module):
    """The range of a tensor.

    Args:
        dtype: The dtype of the integers.
        qscheme: How scale and zero point follow from the range.
        reduce_range: Whether to use one bit less.
        quant_min: Smallest integer; by default that of the dtype.
        quant_max: Largest integer.
        factory_kwargs: Device and dtype of the buffers.
        eps: Smallest scale.

    Attributes:
        described: The observer in recipes.
        eps: One element.
        min_val: The minimum: one element, or one for each channel.
        max_val: The maximum.
    """

    _version = 3  # that of torch.ao's observers with these buffers
    described: str
    is_dynamic = False
    eps: torch.Tensor
    min_val: torch.Tensor
    max_val: torch.Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: Any = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        low, high = (-128, 127) if dtype in _SIGNED else (0, 255)
        if quant_min is not None and quant_max is not None:
            low, high = quant_min, quant_max
        if not low <= 0 <= high or low == high:
            raise ValueError(f"The range of integers must include 0, but is [{low}, {high}].")
        self.dtype, self.qscheme, self.reduce_range = dtype, qscheme, reduce_range
        self.quant_min, self.quant_max = (low // 2, high // 2) if reduce_range else (low, high)
        options = nn.factory_kwargs(factory_kwargs)
        self.register_buffer("eps", torch.tensor([eps], **options))
        low_value, high_value = self._unseen()
        self.register_buffer("min_val", torch.tensor(low_value, **options))
        self.register_buffer("max_val", torch.tensor(high_value, **options))

    def reset_min_max_vals(self) -> None:
        """Forgets the range."""
        for buffer, value in zip((self.min_val, self.max_val), self._unseen(), strict=True):
            unseen = buffer.new_tensor(value)
            buffer.resize_(unseen.shape).copy_(unseen)

    def extra_repr(self) -> str:
        """Returns the range."""
        return f"min_val={self.min_val}, max_val={self.max_val}"

    def _unseen(self) -> tuple[Any, Any]:
        """Returns the range before any data."""
        return torch.inf, -torch.inf

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        resize_buffers(self, ("min_val", "max_val"), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MinMax(Observer):
    """Keeps the minimum and the maximum of all tensors."""

    described = "min_max"


class MovingAverage(Observer):
    """Averages the minimum and the maximum over batches.

    Args:
        averaging_constant: Weight of the next batch.
        **options: As in :class:`Observer`.
    """

    described = "moving_average"

    def __init__(self, averaging_constant: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        self.averaging_constant = averaging_constant


class MinMaxPerChannel(Observer):
    """Keeps the minimum and the maximum of each channel.

    Args:
        ch_axis: The dimension of the channels.
        qscheme: How scale and zero point follow from the range.
        **options: As in :class:`Observer`.
    """

    described = "min_max_per_channel"

    def __init__(self, ch_axis: int = 0, qscheme: Any = torch.per_channel_affine, **options: Any) -> None:
        super().__init__(qscheme=qscheme, **options)
        self.ch_axis = ch_axis

    def _unseen(self) -> tuple[Any, Any]:
        return [], []


class MovingAveragePerChannel(MinMaxPerChannel):
    """Does the same; `FakeQuantize` gives a tensor with channels the range of its latest value.

    Args:
        averaging_constant: Weight of the next batch.
        **options: As in :class:`MinMaxPerChannel`.
    """

    described = "moving_average_per_channel"

    def __init__(self, averaging_constant: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        self.averaging_constant = averaging_constant


class FixedQParams(Constructible, nn.Module):
    """Holds a scale and a zero point that no data change.

    Args:
        scale: The scale.
        zero_point: The zero point.
        dtype: The dtype of the integers.
        quant_min: Smallest integer.
        quant_max: Largest integer.
    """

    described = "torch.ao.quantization.observer.FixedQParamsObserver"  # its name in the recipes of files
    qscheme = torch.per_tensor_affine
    is_dynamic = False
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.quint8,
        quant_min: int = 0,
        quant_max: int = 255,
    ) -> None:
        super().__init__()
        self.dtype, self.quant_min, self.quant_max = dtype, quant_min, quant_max
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int))


OBSERVERS: dict[str, type[Observer]] = {
    kind.described: kind for kind in (MovingAverage, MovingAveragePerChannel, MinMax, MinMaxPerChannel)
}
_OF_TORCH_AO = {
    "MovingAverageMinMaxObserver": "moving_average",
    "MovingAveragePerChannelMinMaxObserver": "moving_average_per_channel",
    "MinMaxObserver": "min_max",
    "PerChannelMinMaxObserver": "min_max_per_channel",
    "HistogramObserver": "histogram",
}


def observer_name(observer: object) -> str:
    """Returns how recipes call an observer: the same name for ours and for `torch.ao`'s class."""
    kind = type(observer)
    if "described" in vars(kind):
        return str(vars(kind)["described"])
    known = _OF_TORCH_AO.get(kind.__name__) if kind.__module__.startswith("torch.ao.") else None
    return known or f"{kind.__module__}.{kind.__qualname__}"


def keeps_histogram(observer: object) -> bool:
    """Whether an observer is `torch.ao`'s with a histogram, which observes by itself."""
    return derives_from(observer, "torch.ao.", "HistogramObserver")


def averages_tensors(observer: object) -> bool:
    """Whether an observer averages the extremes of whole tensors over batches."""
    return isinstance(observer, MovingAverage) or derives_from(
        observer, "torch.ao.", "MovingAverageMinMaxObserver"
    )
