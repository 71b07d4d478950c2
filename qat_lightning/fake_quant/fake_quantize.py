"""The fake-quantize module: it observes a tensor's range and rounds it to the grid of int8.

`torch.ao`'s prepare and convert accept it through a QConfig. Differences from `torch.ao`'s own:

- one grid: the scale and the zero point that `forward` rounds with are the ones that convert reads;
- it observes in training mode only, so that an evaluation moves nothing;
- float32 arithmetic under autocast; a NaN or an infinity never enters a range, and sets a flag;
- its switches are Python attributes, so that neither a GPU nor `torch.compile` waits to read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.quantization import FakeQuantizeBase
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

from qat_lightning.fake_quant.numerics import affine_grid, fake_quantize, round_weight, symmetric_scale

OBSERVERS: dict[str, type[nn.Module]] = {
    "moving_average": MovingAverageMinMaxObserver,
    "moving_average_per_channel": MovingAveragePerChannelMinMaxObserver,
    "min_max": MinMaxObserver,
    "min_max_per_channel": PerChannelMinMaxObserver,
    "histogram": HistogramObserver,
}
OBSERVER_NAMES = {observer: name for name, observer in OBSERVERS.items()}
EPS = float(torch.finfo(torch.float32).eps)
"""The least scale of a grid, as in `torch.ao`: int8 kernels cannot requantize with one far smaller."""
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


class FakeQuantize(ao.FakeQuantize):
    """Observes the range of a tensor and rounds the tensor to the int8 grid of that range.

    Weights (per-channel grids) take their range anew from each tensor, activations follow their observer.

    Args:
        observer: One of torch's observers; moving average by default.
        quant_min: Least integer of the grid.
        quant_max: Integer that the greatest value of the range falls on; 127 for the 7-bit activations of x86
            and fbgemm. A value beyond the range goes on up to the greatest integer of the dtype, as it does
            in the int8 network.
        **observer_kwargs: `dtype`, `qscheme`, `ch_axis` and what else the observer takes.

    Attributes:
        bounds: Least and greatest integer of the dtype.
        scale: float32, one element or one for each channel.
        zero_point: int32, likewise.
        nonfinite: One bool, true once a NaN or an infinity was observed.
        averaging: What share of a moving average the next batch is, if that is more than the observer's
            constant: see :meth:`average_over`.
        in_place: Whether training may overwrite the input with the result.
        centre: Zero point that the grid begins with, and of symmetric grids the only one.
        unit: What the grid shall hold besides 0, for the sake of what reads it; None for nothing. Affine
            grids of a minimum and a maximum do, those of a histogram do not.
    """

    nonfinite: torch.Tensor
    averaging: torch.Tensor
    unit: float | None = None

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        self.register_buffer("nonfinite", torch.zeros(1, dtype=torch.bool), persistent=False)
        self.register_buffer("averaging", torch.zeros(()), persistent=False)
        self.observing = self.rounding = True
        self.seen = self.in_place = False
        self.eps = float(getattr(self.activation_post_process, "eps", EPS))
        self.bounds = (torch.iinfo(self.dtype).min, torch.iinfo(self.dtype).max)
        self.axis = self.ch_axis if self.is_per_channel else None
        self.symmetric = self.qscheme in _SYMMETRIC
        self.centre = quant_max - (quant_max - quant_min) // 2 if self.symmetric else 0
        self.zero_point.fill_(self.centre)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        observed = (self.training and self.observing) or (self.axis is not None and not self.seen)
        extremes = self.observe(X.detach()) if observed else None
        if not self.rounding or X.numel() == 0:
            return X
        if self.axis == 0 and self.symmetric:
            # A weight's grid was made of this very tensor, which lies inside it.
            return round_weight(X, self.scale, self.bounds, inside=observed)
        return fake_quantize(
            X,
            self.scale,
            self.zero_point,
            *self.bounds,
            self.axis,
            extremes=extremes,
            in_place=self.in_place and self.training,
        )

    @torch.no_grad()
    def magnitude(self, weight: torch.Tensor) -> torch.Tensor:
        """The greatest magnitude of each output channel, in float32."""
        rows = weight.detach().flatten(1).float()
        if rows.device.type == "cpu":
            return torch.maximum(rows.amax(1), -rows.amin(1))
        return torch.linalg.vector_norm(rows, torch.inf, 1)  # one kernel, which on a CPU is ten times slower

    def observe(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Takes `x` into the range, and makes the grid of it.

        Returns:
            The minimum and the maximum of `x`, of each channel where the grid is per-channel; None where
            they were not needed.
        """
        if x.numel() == 0:
            return None
        x = x.float()
        if isinstance(self.activation_post_process, HistogramObserver):
            self._observe_histogram(x)
            return None
        extremes = self._extremes(x)
        self._follow(*extremes)
        return extremes

    def observe_magnitude(self, magnitude: torch.Tensor) -> None:
        """Makes the grid of a weight that is never made in memory, from what :meth:`magnitude` says of it."""
        old = _sized(self.activation_post_process.max_val, magnitude, -torch.inf)
        magnitude = torch.where(self._finite(magnitude), magnitude, old)
        self._keep(-magnitude, magnitude)
        self._reach(magnitude)

    def allocate(self, channels: int) -> None:
        """Gives the buffers of a per-channel grid their size, before the first tensor does.

        A compiled forward must not resize them, and processes that merge ranges need equal sizes.
        """
        observer = self.activation_post_process
        for buffer, value in (
            (observer.min_val, torch.inf),
            (observer.max_val, -torch.inf),
            (self.scale, 1),
            (self.zero_point, self.centre),
        ):
            buffer.resize_(channels).fill_(value)

    def refresh(self) -> None:
        """Makes the grid of what the observer holds."""
        observer = self.activation_post_process
        if isinstance(observer, HistogramObserver):
            scale, zero_point = observer.calculate_qparams()
        elif self.symmetric:
            self._reach(torch.maximum(-observer.min_val, observer.max_val))
            return
        else:
            given = (observer.min_val, observer.max_val, self.quant_min, self.quant_max, self.eps)
            scale, zero_point = affine_grid(*given, unit=self.unit)
        _assign(self.scale, scale)
        _assign(self.zero_point, zero_point)

    def calculate_qparams(self, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and the zero point that `forward` rounds with: convert calls this."""
        return self.scale, self.zero_point

    def enable_observer(self, enabled: bool = True) -> None:
        """Switches the observer; `torch.ao.quantization.disable_observer` calls this."""
        self.observing = bool(enabled)
        self.observer_enabled.fill_(int(enabled))

    def average_over(self, batches: int | None) -> None:
        """Makes a moving average the mean over batches: the next is the last of so many; None ends that."""
        self.averaging.fill_(0 if batches is None else 1 / batches)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switches the rounding; `torch.ao.quantization.disable_fake_quant` calls this."""
        self.rounding = bool(enabled)
        self.fake_quant_enabled.fill_(int(enabled))

    def _extremes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.axis is None:
            low, high = torch.aminmax(x)
            return low.reshape(1), high.reshape(1)
        rows = x.movedim(self.axis, 0).flatten(1)
        return rows.amin(1), rows.amax(1)

    def _follow(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Takes extremes into the range: a channel's own as they are, a whole tensor's as its observer does.

        In few operations, since on a GPU each of them takes longer to launch than to run.
        """
        observer = self.activation_post_process
        finite = self._finite(high - low)  # which is none where one of them is none
        if self.axis is not None:
            low = torch.where(finite, low, _sized(observer.min_val, low, torch.inf))
            high = torch.where(finite, high, _sized(observer.max_val, high, -torch.inf))
        else:
            old = torch.cat((observer.min_val.reshape(1), observer.max_val.reshape(1)))
            new = _joined(observer, self.averaging, old, torch.cat((low, high)))
            low, high = torch.where(finite, new, old).split(1)
        self._keep(low, high)
        self.refresh()

    def _finite(self, numbers: torch.Tensor) -> torch.Tensor:
        """Where none of these, which are not negative, is a NaN or an infinity; sets the flag if one is."""
        finite = numbers < torch.inf
        self.nonfinite.logical_or_(~(finite if finite.numel() == 1 else finite.all()))
        return finite

    def _keep(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Makes these the range."""
        _assign(self.activation_post_process.min_val, low)
        _assign(self.activation_post_process.max_val, high)
        self.seen = True

    def _reach(self, magnitude: torch.Tensor) -> None:
        """Makes the symmetric grid that ends at `magnitude`; its zero point stays what it is."""
        _assign(self.scale, symmetric_scale(magnitude, self.quant_min, self.quant_max, self.eps))
        if self.zero_point.shape != self.scale.shape:
            self.zero_point.resize_(self.scale.shape).fill_(self.centre)

    def _observe_histogram(self, x: torch.Tensor) -> None:
        finite = torch.isfinite(x).all()
        self.nonfinite.logical_or_(~finite)
        if finite:
            self.activation_post_process(x)
            self.refresh()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.observing = bool(self.observer_enabled.any())
        self.rounding = bool(self.fake_quant_enabled.any())
        low = state_dict.get(prefix + "activation_post_process.min_val")  # its own turn comes later
        self.seen = low is not None and bool(low.numel() and torch.isfinite(low).all())


def _joined(observer: Any, share: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """A minimum and a maximum with those of the next batch: an average of batches, or the extremes of all."""
    if isinstance(observer, MovingAverageMinMaxObserver):
        seen = old[0] <= old[1]  # at first they are inf and -inf
        return torch.where(seen, old + share.clamp(min=observer.averaging_constant) * (new - old), new)
    return torch.cat((torch.minimum(old[:1], new[:1]), torch.maximum(old[1:], new[1:])))


def _sized(buffer: torch.Tensor, like: torch.Tensor, unseen: float) -> torch.Tensor:
    """A per-channel buffer, which before the first tensor has no channels."""
    return buffer if buffer.shape == like.shape else torch.full_like(like, unseen)


def _assign(buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Copies into a buffer in place, so that whoever holds the buffer sees it."""
    if buffer.numel() != value.numel():
        buffer.resize_(value.shape)
    buffer.copy_(value.reshape(buffer.shape))


def fake_quantizes(module: nn.Module) -> Iterator[tuple[str, FakeQuantizeBase]]:
    """Yields the name and the module of every fake-quantize inside `module`, each once."""
    for name, child in module.named_modules():
        if isinstance(child, FakeQuantizeBase):
            yield name, child
