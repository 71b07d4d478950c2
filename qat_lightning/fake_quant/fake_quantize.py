"""The fake-quantize module: observes the range of a tensor and rounds the tensor to int8 values.

It has the buffers and attributes of `torch.ao`'s own module, so `torch.ao`'s prepare and convert accept it
through a QConfig. It differs from that module:

- `forward` rounds with exactly the scale and the zero point that convert reads;
- it observes in training mode only, so that an evaluation changes no range;
- it computes in float32 under autocast;
- NaN and infinity never enter a range, but set a flag;
- its switches are Python attributes, so that neither a GPU nor `torch.compile` waits to read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qat_lightning.fake_quant.cpu_ranges import is_eager_on_cpu, move_range, set_ranges
from qat_lightning.fake_quant.forward_extremes import ForwardExtremes
from qat_lightning.fake_quant.numerics import (
    Kernel,
    affine_qparams,
    fake_quantize,
    round_weight,
    symmetric_scale,
)
from qat_lightning.fake_quant.observers import (
    EPS,
    MovingAverage,
    averages_tensors,
    keeps_histogram,
    resize_buffers,
)
from qat_lightning.fake_quant.switches import Switches, is_fake_quantize
from qat_lightning.fake_quant.tensor_ranges import assign, updated_ranges, with_channels

_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_PER_CHANNEL = (
    torch.per_channel_symmetric,
    torch.per_channel_affine,
    torch.per_channel_affine_float_qparams,
)


class FakeQuantize(Switches):
    """Observes the range of a tensor and rounds the tensor to the int8 values of that range.

    A weight (per-channel qparams) has the range of its latest tensor. The range of an activation follows the
    observer.

    Args:
        observer: The class of one of `torch.ao`'s observers, or a constructor; by default a moving average.
        quant_min: Smallest integer.
        quant_max: The integer for the top of the range; 127 for the 7-bit activations of x86 and fbgemm.
            Values beyond the range continue up to the largest integer of the dtype, as in the int8 network.
        **observer_kwargs: `dtype`, `qscheme`, `ch_axis` and other arguments of the observer.

    Attributes:
        bounds: Smallest and largest integer of the dtype.
        scale: float32, one element or one for each channel.
        zero_point: int32, as many elements as `scale`.
        nonfinite: One bool, true once a NaN or an infinity was observed.
        averaging: Weight of the next batch in a moving average, where it exceeds the observer's averaging
            constant: see :meth:`average_over`.
        averages: Whether the observer averages the extremes over batches.
        in_place: Whether training may overwrite the input with the result.
        forward_extremes: Joins the extremes of the tensors that it rounds in one forward.
        initial_zero_point: Zero point before any data; symmetric qparams keep it.
        exact_value: A value that the qparams must represent exactly, besides 0, for the operation that reads
            the result. None for no such value. Affine qparams of a minimum and a maximum respect it, those of
            a histogram do not.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    nonfinite: torch.Tensor
    averaging: torch.Tensor
    exact_value: float | None = None
    like_onednn = False

    def __init__(
        self,
        observer: Any = MovingAverage,
        quant_min: int = 0,
        quant_max: int = 255,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        made: Any = observer(quant_min=quant_min, quant_max=quant_max, **observer_kwargs)
        self.activation_post_process = made
        self.quant_min, self.quant_max = int(made.quant_min), int(made.quant_max)
        self.dtype, self.qscheme = made.dtype, made.qscheme
        self.is_per_channel, self.ch_axis = made.qscheme in _PER_CHANNEL, getattr(made, "ch_axis", -1)
        self.is_dynamic = bool(getattr(made, "is_dynamic", False))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int))
        self.register_buffer("nonfinite", torch.zeros(1, dtype=torch.bool), persistent=False)
        self.register_buffer("averaging", torch.zeros(()), persistent=False)
        self.observing = self.rounding = True
        self.seen = self.in_place = False
        self.forward_extremes = ForwardExtremes()
        self.eps = float(getattr(made, "eps", EPS))
        self._has_histogram, self.averages = keeps_histogram(made), averages_tensors(made)
        self.bounds = (torch.iinfo(self.dtype).min, torch.iinfo(self.dtype).max)
        if not self.bounds[0] <= quant_min <= quant_max <= self.bounds[1]:
            raise ValueError(f"{self.dtype} has no integers [{quant_min}, {quant_max}].")
        self.axis = self.ch_axis if self.is_per_channel else None
        self.symmetric = self.qscheme in _SYMMETRIC
        self.initial_zero_point = quant_max - (quant_max - quant_min) // 2 if self.symmetric else 0
        self.zero_point.fill_(self.initial_zero_point)

    def forward(self, X: torch.Tensor, averaged: bool = False) -> torch.Tensor:
        """Returns the rounded tensor; `averaged` says that it averages values that are rounded already."""
        if not X.is_floating_point():  # lengths, ids and masks have no range, and convert drops the rounding
            return X
        observed = (self.training and self.observing) or (self.axis is not None and not self.seen)
        extremes = self.observe(X.detach()) if observed else None
        if not self.rounding or X.numel() == 0:
            return X
        if self.axis == 0 and self.symmetric:
            # If the scale was just computed from this very tensor, nothing is clipped.
            return round_weight(X, self.scale, self.bounds, inside=observed)
        return fake_quantize(
            X,
            self.scale,
            self.zero_point,
            *self.bounds,
            self.axis,
            extremes=extremes,
            in_place=self.in_place and self.training,
            kernel=Kernel(averaged) if self.like_onednn and not self.training else None,
        )

    @torch.no_grad()
    def magnitude(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the largest magnitude of each output channel, in float32."""
        rows = weight.detach().flatten(1).float()
        if rows.device.type == "cpu":
            return torch.maximum(rows.amax(1), -rows.amin(1))
        return torch.linalg.vector_norm(rows, torch.inf, 1)  # one kernel, but ten times slower on a CPU

    def observe(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Updates the range with `x`, and the scale and the zero point with the range.

        Returns:
            The minimum and the maximum of `x`, of each channel if the qparams are per-channel; None if they
            were not needed.
        """
        if x.numel() == 0:
            return None
        x = x.float()
        if self._has_histogram:
            self._observe_histogram(x)
            return None
        extremes = self._extremes(x)
        self._update_ranges(*extremes)
        return extremes

    def observe_magnitude(self, magnitude: torch.Tensor) -> None:
        """Sets the range of a weight that never exists in memory, from each channel's largest magnitude."""
        if self._is_quick() and set_ranges(self, -magnitude, magnitude, magnitude):
            return
        old = with_channels(self.activation_post_process.max_val, magnitude, -torch.inf)
        magnitude = torch.where(self._check_finite(magnitude), magnitude, old)
        self._set_range(-magnitude, magnitude)
        self._set_symmetric_qparams(magnitude)

    def allocate(self, channels: int) -> None:
        """Sizes the buffers of per-channel qparams, before the first tensor would.

        A compiled forward must not resize them, and processes that merge ranges need equal sizes.
        """
        observer = self.activation_post_process
        for buffer, value in (
            (observer.min_val, torch.inf),
            (observer.max_val, -torch.inf),
            (self.scale, 1),
            (self.zero_point, self.initial_zero_point),
        ):
            buffer.resize_(channels).fill_(value)

    def refresh(self) -> None:
        """Computes the scale and the zero point from the observer's range."""
        observer = self.activation_post_process
        if self._has_histogram:
            scale, zero_point = observer.calculate_qparams()
        elif self.symmetric:
            self._set_symmetric_qparams(torch.maximum(-observer.min_val, observer.max_val))
            return
        else:
            arguments = (observer.min_val, observer.max_val, self.quant_min, self.quant_max, self.eps)
            scale, zero_point = affine_qparams(*arguments, exact_value=self.exact_value)
        assign(self.scale, scale)
        assign(self.zero_point, zero_point)

    def calculate_qparams(self, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scale and the zero point that `forward` rounds with; convert calls this."""
        return self.scale, self.zero_point

    def enable_observer(self, enabled: bool = True) -> None:
        """Switches the observer; `torch.ao.quantization.disable_observer` calls this."""
        super().enable_observer(enabled)
        self.observing = bool(enabled)

    def average_over(self, batches: int | None) -> None:
        """Makes a moving average the plain mean over `batches`, counting the next one; None ends this."""
        self.averaging.fill_(0 if batches is None else 1 / batches)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switches the rounding; `torch.ao.quantization.disable_fake_quant` calls this."""
        super().enable_fake_quant(enabled)
        self.rounding = bool(enabled)

    def extra_repr(self) -> str:
        """Returns the qparams, and what is switched on."""
        return (
            f"observing={self.observing}, rounding={self.rounding}, quant_min={self.quant_min}, "
            f"quant_max={self.quant_max}, dtype={self.dtype}, qscheme={self.qscheme}, "
            f"ch_axis={self.ch_axis}, scale={self.scale}, zero_point={self.zero_point}"
        )

    def _extremes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.axis is None:
            low, high = torch.aminmax(x)
            return low.reshape(1), high.reshape(1)
        rows = x.movedim(self.axis, 0).flatten(1)
        return rows.amin(1), rows.amax(1)

    def _update_ranges(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Updates the range with the extremes of a tensor, or of each channel."""
        quick = self._is_quick()
        if quick and self.axis is None:
            move_range(self, low.item(), high.item())
        elif not (quick and self.symmetric and set_ranges(self, low, high, torch.maximum(-low, high))):
            finite = self._check_finite(high - low)  # NaN or infinite if either is
            self._set_range(*updated_ranges(self, low, high, finite))
            self.refresh()

    def _is_quick(self) -> bool:
        """Whether ranges move with few operations: on a CPU, and with buffers in float32."""
        return is_eager_on_cpu(self.scale) and self.scale.dtype == torch.float32

    def train(self, mode: bool = True) -> FakeQuantize:
        """Switches the mode. A forward that was broken off does not go on in the next one."""
        self.forward_extremes.begin()
        super().train(mode)
        return self

    def _check_finite(self, nonnegative: torch.Tensor) -> torch.Tensor:
        """Returns a mask of the finite elements, and sets the flag if any is NaN or infinite."""
        finite = nonnegative < torch.inf
        self.nonfinite.logical_or_(~(finite if finite.numel() == 1 else finite.all()))
        return finite

    def _set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        assign(self.activation_post_process.min_val, low)
        assign(self.activation_post_process.max_val, high)
        self.seen = True

    def _set_symmetric_qparams(self, magnitude: torch.Tensor) -> None:
        """Computes the scale from the largest magnitude; the zero point stays as it is."""
        assign(self.scale, symmetric_scale(magnitude, self.quant_min, self.quant_max, self.eps))
        if self.zero_point.shape != self.scale.shape:
            self.zero_point.resize_(self.scale.shape).fill_(self.initial_zero_point)

    def _observe_histogram(self, x: torch.Tensor) -> None:
        finite = torch.isfinite(x).all()
        self.nonfinite.logical_or_(~finite)
        if finite:
            self.activation_post_process(x)
            self.refresh()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        resize_buffers(self, ("scale", "zero_point"), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.observing = bool(self.observer_enabled.any())
        self.rounding = bool(self.fake_quant_enabled.any())
        low = state_dict.get(prefix + "activation_post_process.min_val")  # the observer loads only after this
        self.seen = low is not None and bool(low.numel() and torch.isfinite(low).all())


def fake_quantizes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the name and the module of each fake-quantize in `module`, once."""
    for name, child in module.named_modules():
        if is_fake_quantize(child):
            yield name, child
