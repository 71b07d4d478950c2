"""`keep_for_target`: finds the layers that must stay float for int8 to reach an accuracy target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from qat_lightning.analysis.batches import Batches, Metric, check_metric, score
from qat_lightning.analysis.sensitivity import check_counts, measure
from qat_lightning.analysis.sensitivity_table import Sensitivity
from qat_lightning.analysis.simulation import simulate
from qat_lightning.base import random_state
from qat_lightning.base.errors import TargetError
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.options import ModuleOptions, Settings
from qat_lightning.quantize.recipe import quantized_networks

_ADVICE = (
    "Allow a greater max_drop, choose a backend with 8-bit activations (onednn, qnnpack), pass "
    "replace_relu6=False if the network has ReLU6, or train without a target: training recovers much of the "
    "loss."
)


def keep_for_target(
    module: nn.Module,
    dataloader: Iterable[Any],
    metric: Metric,
    *,
    max_drop: float = 0.5,
    higher_is_better: bool = True,
    max_layers: int | None = None,
    samples: int = 16,
    batches: int | None = None,
    calibration_batches: int = 8,
    **options: Unpack[ModuleOptions],
) -> tuple[str, ...]:
    """Finds a small set of layers to keep float, so that int8 loses at most `max_drop` of a metric.

    Int8 is simulated with calibrated ranges, without training. Layers are ranked by how many decibels it
    gains to keep each float, per multiply-add. The search takes layers from the top of the ranking until the
    target is reached, and then drops the ones that are not needed. Each choice is prepared again with
    `keep_float`, calibrated and scored.

    Args:
        module: A float LightningModule or network. It does not change.
        dataloader: As in :func:`qat_lightning.sensitivity`.
        metric: A function of (outputs, batch), or the name of a metric that the module's `validation_step`
            logs.
        max_drop: By how many percentage points the metric may fall. For a metric between 0 and 1, 0.5 allows
            a fall from 0.900 to 0.895. If more is better, a metric above 1 counts as a percentage: 0.5 allows
            a fall from 90.0 to 89.5.
        higher_is_better: Whether more of the metric is better; False for a loss.
        max_layers: How many layers may stay float; by default all but one.
        samples: On how many samples outputs are compared, for the ranking.
        batches: On how many batches the metric is computed; all by default.
        calibration_batches: On how many batches ranges are calibrated.
        **options: How networks are prepared, see :class:`qat_lightning.ModuleOptions`. Layers in `keep_float`
            always stay float. They are not among the returned names.

    Returns:
        Names for `keep_float`. Empty if int8 reaches the target without float layers.

    Raises:
        TargetError: The target is missed even with all layers float that may stay float.
        ValueError: The module is quantized already or cannot be prepared; the metric is not logged, or its
            scale is unknown; a number is out of range.
        TypeError: An argument is of the wrong type.

    Example::

        names = keep_for_target(module, datamodule.val_dataloader(), "val_accuracy", max_drop=0.5)
        callback = QuantizationAwareTraining(keep_float=names)
    """
    settings = Settings.of(options, "keep_for_target")
    check_counts(samples=samples, batches=batches, calibration_batches=calibration_batches)
    _check(module, max_drop, max_layers)
    check_metric(module, metric)
    sign = 1 if higher_is_better else -1
    with random_state.preserved(), torch.inference_mode(False), torch.no_grad():
        calibration = Batches(dataloader, calibration_batches)
        search = _Search(module, settings, calibration, metric, Batches(dataloader, batches), sign)
        return search.find(samples, max_drop, max_layers)


def _check(module: nn.Module, max_drop: float, max_layers: int | None) -> None:
    if max_drop < 0:
        raise ValueError(f"max_drop must be at least 0 points, but received {max_drop}.")
    if max_layers is not None and max_layers < 0:
        raise ValueError(f"max_layers must be at least 0, or None, but received {max_layers}.")
    if next(quantized_networks(module), None) is not None:
        raise ValueError(
            f"keep_for_target prepares the module several times, with different layers float, but this "
            f"{type(module).__name__} is prepared already. Pass the float module."
        )


class _Search:
    """Simulates one module with different choices of float layers, and scores each choice once."""

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        calibration: Batches,
        metric: Metric,
        scored: Batches,
        sign: int,
    ) -> None:
        self.module, self.settings = module, settings
        self.calibration, self.metric, self.scored, self.sign = calibration, metric, scored, sign
        self.float_score = score(copy_of(module).eval(), metric, scored)
        self.points = points_per_unit(self.float_score, metric, sign)
        self.int8 = simulate(module, settings, calibration)
        self.scores: dict[frozenset[str], float] = {}

    def find(self, samples: int, target: float, most: int | None) -> tuple[str, ...]:
        """Searches, and logs the result.

        Args:
            samples: On how many samples outputs are compared, for the ranking.
            target: How many percentage points may be lost.
            most: How many layers may stay float.
        """
        ranked = ranking(measure(self.int8, samples))
        all_but_one = len(ranked) - 1  # a layer must be left to quantize
        candidates = ranked[: all_but_one if most is None else min(most, all_but_one)]

        def reaches(names: Iterable[str]) -> bool:
            return self.drop(names) <= target

        count = fewest(candidates, reaches)
        before = f"the metric is {self.float_score:.4g} in float and {self.score(()):.4g} in int8"
        if count is None:
            raise TargetError(
                f"Int8 must lose at most {target:g} points, but {before}, {self.drop(()):.3g} points worse. "
                f"Even with {len(candidates)} of {len(ranked)} layers float it is "
                f"{self.score(candidates):.4g}, {self.drop(candidates):.3g} points worse. "
                f"{_ADVICE if most is None else _ADVICE.replace('max_drop', 'max_drop or max_layers')}"
            )
        found = tuple(needed((), candidates[:count], reaches))
        after = f"with {', '.join(found)} float it is {self.score(found):.4g}"
        result = after if found else "no layer has to stay float"
        rank_zero_info(f"Target of at most {target:g} points: {before}; {result}")
        return found

    def drop(self, names: Iterable[str]) -> float:
        """Returns the percentage points that int8 loses with these layers float."""
        return self.points * self.sign * (self.float_score - self.score(names))

    def score(self, names: Iterable[str]) -> float:
        """Returns the metric of int8 with these layers float."""
        kept = frozenset(names)
        if kept not in self.scores:
            simulation = self.int8
            if kept:
                settings = replace(self.settings, keep_float=(*self.settings.keep_float, *sorted(kept)))
                simulation = simulate(self.module, settings, self.calibration, self.int8.inputs)
            simulation.round_with(simulation.fake_quants)
            self.scores[kept] = score(simulation.module, self.metric, self.scored)
        return self.scores[kept]


def points_per_unit(value: float, metric: Metric, sign: int) -> int:
    """Returns how many percentage points one unit of a metric is, judged by the float network's value.

    Args:
        value: The metric of the float network.
        metric: The metric itself, for the message.
        sign: 1 if more of it is better, -1 if less is.

    Raises:
        ValueError: The value is neither a share between 0 and 1 nor a percentage.
    """
    if -1 <= value <= 1:  # a correlation, for example, can be below 0
        return 100
    if sign > 0 and 1 < value <= 100:
        return 1
    name = repr(metric) if isinstance(metric, str) else getattr(metric, "__name__", "the metric")
    raise ValueError(
        f"max_drop is in percentage points, so the metric must lie between 0 and 1, or, if more of it is "
        f"better, between 0 and 100, but {name} is {value:.4g} for the float network. Name an accuracy or "
        "another share, or pass a function that returns one."
    )


def ranking(found: Sensitivity) -> list[str]:
    """Ranks the layers by how many decibels it gains to keep each float, per multiply-add, best first.

    Layers that gain nothing alone come last, the cheapest first: they may still gain together with others.
    """
    ranked = sorted(found.layers, key=lambda each: (-max(each.gain, 0) / max(each.macs, 1), each.macs))
    return list(dict.fromkeys(each.name for each in ranked))


def fewest(ranked: Sequence[str], reaches: Callable[[Iterable[str]], bool]) -> int | None:
    """Finds the least number of first names that suffices, by doubling and bisection; None if all do not."""
    low, high = -1, 0
    while not reaches(ranked[:high]):
        if high == len(ranked):
            return None
        low, high = high, min(max(2 * high, 1), len(ranked))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(ranked[:middle]) else (middle, high)
    return high


def needed(
    kept: Sequence[str], names: Sequence[str], reaches: Callable[[Iterable[str]], bool]
) -> Sequence[str]:
    """Returns a minimal subset of `names` that suffices together with `kept`: QuickXplain (Junker 2004)."""
    if not names or reaches(kept):
        return ()
    if len(names) == 1:
        return names
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    later = needed((*kept, *first), second, reaches)
    return (*needed((*kept, *later), first, reaches), *later)
