"""The schedule of a run: says which phase a step is in, from its epoch and number alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

Point = int | float | None


class Phase(NamedTuple):
    """What is on in a prepared network at one step.

    Attributes:
        fake_quant: Activations and weights are rounded as in int8.
        observe: Observers follow the data, so scales and zero points change.
        freeze_bn: Batch-norm statistics stay as they are.
    """

    fake_quant: bool
    observe: bool
    freeze_bn: bool


class Moment(NamedTuple):
    """A moment of a run: the start of an epoch, a global step, or never if both are None."""

    epoch: int | None = None
    step: int | None = None

    def reached(self, epoch: int, step: int) -> bool:
        """Returns whether a run that is about to do `step` in `epoch`, both from 0, has reached it."""
        if self.epoch is not None:
            return epoch >= self.epoch
        return self.step is not None and step >= self.step


_AT_ONCE = Moment(step=0)


@dataclass(frozen=True)
class Schedule:
    """When observers and batch-norm statistics freeze, and when fake-quantization starts.

    Args:
        freeze_bn_at: When batch-norm statistics freeze: an epoch (int), a fraction of the run (float in
            [0, 1)), or None for never.
        freeze_observers_at: When observers freeze, in the same form.
        fake_quant_from: Epoch at which fake-quantization starts.
        calibration_steps: Steps at the start of the run in which observers watch and nothing is rounded. In a
            run of known length, they are at most a twentieth of it.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is negative, or a float of 1 or more.
    """

    freeze_bn_at: Point
    freeze_observers_at: Point
    fake_quant_from: int
    calibration_steps: int = 0

    def __post_init__(self) -> None:
        _check("freeze_bn_at", self.freeze_bn_at)
        _check("freeze_observers_at", self.freeze_observers_at)
        if isinstance(self.fake_quant_from, float) or self.fake_quant_from is None:
            raise TypeError(
                "fake_quant_from is an epoch, an int from 0, but received "
                f"{self.fake_quant_from!r}. Use 0 to start fake-quantization right away."
            )
        _check("fake_quant_from", self.fake_quant_from)
        steps = self.calibration_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"calibration_steps is a number of steps, an int from 0, but received {steps!r}. Use 0 to "
                "start fake-quantization with the range of the first batch."
            )

    @property
    def has_fraction(self) -> bool:
        """Whether a moment is given as a fraction, so that :meth:`resolve` needs the length of the run."""
        return any(isinstance(p, float) for p in (self.freeze_bn_at, self.freeze_observers_at))

    def resolve(self, total_steps: float) -> ResolvedSchedule:
        """Turns fractions into global steps.

        Args:
            total_steps: Optimizer steps of the whole run; may be infinite if there is no fraction.

        Raises:
            ValueError: There is a fraction, and the run has no known length.
        """
        if self.has_fraction and not math.isfinite(total_steps):
            raise ValueError(
                "A freeze given as a fraction needs a run of known length, but this Trainer has "
                "neither max_epochs with a sized dataloader nor max_steps. Set one of them, or give "
                f"the freeze as an epoch. Received freeze_bn_at={self.freeze_bn_at} and "
                f"freeze_observers_at={self.freeze_observers_at}."
            )
        return ResolvedSchedule(
            freeze_bn=_resolve(self.freeze_bn_at, total_steps),
            freeze_observers=_resolve(self.freeze_observers_at, total_steps),
            fake_quant=Moment(epoch=self.fake_quant_from),
            calibrated=Moment(step=int(min(self.calibration_steps, total_steps / 20))),
        )


@dataclass(frozen=True)
class ResolvedSchedule:
    """A schedule in epochs and global steps. A resumed run keeps the one that it started with."""

    freeze_bn: Moment
    freeze_observers: Moment
    fake_quant: Moment
    calibrated: Moment = _AT_ONCE  # the default is for checkpoints from before calibration existed

    def phase(self, epoch: int, step: int) -> Phase:
        """Returns the phase of the global step `step` in `epoch`, both from 0.

        Observers are always on in the calibration and in the first step, whatever the schedule says: without
        an observed batch there is no range to freeze.
        """
        calibrated = self.calibrated.reached(epoch, step)
        return Phase(
            fake_quant=calibrated and self.fake_quant.reached(epoch, step),
            observe=step < 1 or not calibrated or not self.freeze_observers.reached(epoch, step),
            freeze_bn=self.freeze_bn.reached(epoch, step),
        )

    def never_reached(self, epochs: float, steps: float) -> list[str]:
        """Returns the names of the moments that lie beyond the end of a run.

        A run of a single step cannot reach any fraction of itself. Such moments are not named.
        """
        moments = {
            "freeze_bn_at": self.freeze_bn,
            "freeze_observers_at": self.freeze_observers,
            "fake_quant_from": self.fake_quant,
        }
        return [
            name
            for name, (epoch, step) in moments.items()
            if (epoch is not None and epoch >= epochs) or (step is not None and step >= max(steps, 2))
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns the schedule as plain values, for a checkpoint."""
        return {name: tuple(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ResolvedSchedule:
        """Builds the schedule that `state_dict` returned."""
        return cls(**{name: Moment(*state[name]) for name in cls.__dataclass_fields__ if name in state})


def _check(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name} is an epoch (int), a fraction of the run (float below 1) or None, but received "
            f"{value!r} of type {type(value).__name__}."
        )
    if value < 0 or math.isnan(value):
        raise ValueError(f"{name} must not be negative, but received {value!r}. Use None for never.")
    if isinstance(value, float) and value >= 1:
        raise ValueError(
            f"{name} as a float is a fraction of the run and must be below 1, but received {value!r}. "
            f"For an epoch pass an int ({name}={int(value) if math.isfinite(value) else 1}); for never, None."
        )


def _resolve(point: Point, total_steps: float) -> Moment:
    if isinstance(point, float):
        return Moment(step=max(1, round(point * total_steps)))
    return Moment(epoch=point)
