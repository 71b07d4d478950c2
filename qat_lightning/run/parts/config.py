"""`AccuracyTarget` and `Distillation`: arguments of the callback that group several values and check them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qat_lightning.run.parts import teachers


@dataclass(frozen=True)
class AccuracyTarget:
    """How much of a metric int8 may lose before training. A few layers stay float to reach it.

    At the start of fit, :func:`qat_lightning.keep_for_target` finds these layers on the validation data. They
    stay float in addition to `keep_float`. The module must hold trained weights. A resumed run keeps the
    layers that it started with.

    Args:
        max_drop: By how many percentage points the metric may fall. For a metric between 0 and 1, 0.5 allows
            a fall from 0.900 to 0.895; for a percentage between 0 and 100, from 90.0 to 89.5.
        metric: Name of the metric, as `validation_step` logs it. By default the one that the first
            ModelCheckpoint monitors.
        mode: `"max"` if a higher metric is better, `"min"` if a lower one is. By default the mode of the
            callback that monitors it.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of the wrong type.
    """

    max_drop: float = 0.5
    metric: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_drop, bool) or not isinstance(self.max_drop, int | float):
            raise TypeError(
                f"max_drop must be a number of percentage points, but received {self.max_drop!r}."
            )
        if not 0 <= self.max_drop < math.inf:
            raise ValueError(f"max_drop must be at least 0 and finite, but received {self.max_drop}.")
        if self.metric is not None and not isinstance(self.metric, str):
            raise TypeError(
                "metric must be the name of a metric that `validation_step` logs, or None, but received "
                f"{self.metric!r}. qat_lightning.keep_for_target takes functions."
            )
        if self.mode not in ("max", "min", None):
            raise ValueError(f"mode must be 'max', 'min' or None, but received {self.mode!r}.")


@dataclass(frozen=True)
class Distillation:
    """The teacher whose logits the network learns in addition to its labels.

    `training_step` need not change: the gradient of the divergence from the teacher is added to that of its
    loss. The divergence is logged as `train/distillation` (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531).

    Args:
        teacher: `"self"`, the float network with its weights at the call of `fit`; another float network; or
            a mapping from the names of several networks to their teachers. A teacher is copied and frozen,
            and checkpoints do not hold it.
        weight: Factor of the divergence. 1 by default: the divergence then weighs as much as a cross entropy
            averaged over the batch.
        temperature: Divides the logits of both networks before the softmax. 1 by default: the network learns
            the teacher's own probabilities. Higher values soften them.

    Raises:
        ValueError: A value is out of range, or the teacher is quantized.
        TypeError: A value is of the wrong type.
    """

    teacher: teachers.TeacherLike = teachers.SELF
    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("temperature", self.temperature)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, but received {value!r}.")
            if not 0 < value < math.inf:
                fix = " For no distillation, pass distillation=None." if name == "weight" else ""
                raise ValueError(f"{name} must be above 0 and finite, but received {value}.{fix}")
        object.__setattr__(self, "teacher", teachers.copied(self.teacher))
