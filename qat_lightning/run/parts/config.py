"""Groups of the callback's arguments: frozen dataclasses that check themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qat_lightning.run.parts import teachers


@dataclass(frozen=True)
class AccuracyTarget:
    """How much of a metric int8 may lose before training; the few layers that this takes stay float.

    They are searched for at the start of fit, on the validation data, and stay float beside `keep_float`. See
    :func:`qat_lightning.keep_for_target`. The module has to hold trained weights. A resumed run keeps the
    layers that it began with.

    Args:
        max_drop: By how many percentage points the metric may fall. Of a metric between 0 and 1, 0.5 allows
            0.900 to become 0.895; of a percentage between 0 and 100, 90.0 to become 89.5.
        metric: Its name, as `validation_step` logs it. By default the one that the first ModelCheckpoint
            monitors.
        mode: `"max"` if more of it is better, `"min"` if less is. By default that of the callback that
            monitors it.

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
    """Whose logits the network learns beside its labels.

    `training_step` stays as it is: the divergence from the teacher is added to the gradient of its loss, and
    logged as `train/distillation` (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    Args:
        teacher: `"self"`, the float network with the weights that it has when `fit` is called; another float
            network; or, where there are several networks, a mapping of their names to these. A network is
            copied and frozen, and no checkpoint holds it.
        weight: Factor of the divergence. 1 by default: as much as a cross entropy in the mean over the batch.
        temperature: What the logits of both networks are divided by before the softmax. 1 by default: the
            network reproduces the float network's own answer, and no softer one.

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
