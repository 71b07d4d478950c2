"""`keep_for_target`: the layers that have to stay float for int8 to be as good as is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from qat_lightning.analysis.batches import Batches, Metric, check_metric, score
from qat_lightning.analysis.sensitivity import check_counts, measure
from qat_lightning.analysis.sensitivity_table import Sensitivity
from qat_lightning.analysis.simulation import simulate
from qat_lightning.base import random_state
from qat_lightning.base.errors import TargetError
from qat_lightning.modes.qconfig import Overrides, QConfigLike
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.networks import Settings
from qat_lightning.quantize.recipe import quantized_networks
from qat_lightning.quantize.selection import FloatPattern

_ADVICE = (
    "Allow a greater target_drop, choose a backend with 8 bits for activations (onednn, qnnpack), pass "
    "replace_relu6=False where the network has ReLU6, or train without a target: training wins back much of "
    "the loss."
)


def keep_for_target(
    module: nn.Module,
    dataloader: Iterable[Any],
    metric: Metric,
    *,
    target_drop: float = 0.5,
    higher_is_better: bool = True,
    max_layers: int | None = None,
    backend: str = "x86",
    qconfig: QConfigLike | None = None,
    mode: str = "auto",
    modules: Sequence[str] | None = None,
    keep_float: Sequence[FloatPattern] = (),
    fuse: str | Sequence[Sequence[str]] = "auto",
    replace_relu6: bool = True,
    overrides: Overrides | None = None,
    untraceable: str = "error",
    samples: int = 16,
    batches: int | None = None,
    calibration_batches: int = 8,
) -> tuple[str, ...]:
    """Finds few layers to keep float, with which int8 loses no more of a metric than is asked for.

    Int8 is simulated with calibrated ranges, without training. The layers are ranked by the decibels that
    keeping each float gains for its multiply-adds. Each choice is prepared anew with `keep_float`,
    calibrated, and scored: as many of the ranking as it takes, without those that turn out not to be needed.

    Args:
        module: A float LightningModule or network; it is not changed.
        dataloader: As in :func:`qat_lightning.sensitivity`.
        metric: A function of (outputs, batch), or the name of a metric that the module's `validation_step`
            logs.
        target_drop: By how many points the metric may fall, of which there are 100 between 0 and 1: 0.5
            allows an accuracy of 0.900 to become 0.895.
        higher_is_better: Whether more of the metric is better; False for a loss.
        max_layers: How many layers may stay float; by default all but one.
        backend: As in :class:`qat_lightning.QuantizationAwareTraining`, like all up to `untraceable`.
        qconfig: Likewise.
        mode: Likewise.
        modules: Likewise.
        keep_float: What stays float in any case; not among the names that are returned.
        fuse: As in :class:`qat_lightning.QuantizationAwareTraining`.
        replace_relu6: Likewise.
        overrides: Likewise.
        untraceable: Likewise.
        samples: How many samples the outputs are compared on, for the ranking.
        batches: How many batches the metric is computed on; all by default.
        calibration_batches: How many batches ranges are calibrated on.

    Returns:
        Names for `keep_float`; none where int8 is good enough without.

    Raises:
        TargetError: Not even all layers that may stay float are enough.
        ValueError: The module is quantized already or cannot be prepared; the metric is not logged; a number
            is out of range.
        TypeError: An argument is of the wrong type.

    Example::

        names = keep_for_target(module, datamodule.val_dataloader(), "val_accuracy", target_drop=0.5)
        callback = QuantizationAwareTraining(keep_float=names)
    """
    settings = Settings(
        backend, qconfig, mode, modules, keep_float, fuse, replace_relu6, overrides, untraceable
    )
    check_counts(samples=samples, batches=batches, calibration_batches=calibration_batches)
    _check(module, target_drop, max_layers)
    check_metric(module, metric)
    sign = 1 if higher_is_better else -1
    with random_state.preserved(), torch.inference_mode(False), torch.no_grad():
        calibration = Batches(dataloader, calibration_batches)
        search = _Search(module, settings, calibration, metric, Batches(dataloader, batches), sign)
        return search.run(samples, target_drop, max_layers)


def _check(module: nn.Module, target_drop: float, max_layers: int | None) -> None:
    if target_drop < 0:
        raise ValueError(f"target_drop must be at least 0 points, but received {target_drop}.")
    if max_layers is not None and max_layers < 0:
        raise ValueError(f"max_layers must be at least 0, or None, but received {max_layers}.")
    if next(quantized_networks(module), None) is not None:
        raise ValueError(
            f"keep_for_target prepares the module with one layer or another float, but this "
            f"{type(module).__name__} is prepared already. Pass the float module."
        )


class _Search:
    """Simulations of one module with various layers float, each scored once."""

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
        self.exact = score(copy_of(module).eval(), metric, scored)
        self.int8 = simulate(module, settings, calibration)
        self.scores: dict[frozenset[str], float] = {}

    def run(self, samples: int, target: float, most: int | None) -> tuple[str, ...]:
        """Searches, and says what it found.

        Args:
            samples: How many samples the ranking is made from.
            target: How many points may be lost.
            most: How many layers may stay float.
        """
        ranked = ranking(measure(self.int8, samples))
        least = len(ranked) - 1  # something has to be left to quantize
        candidates = ranked[: least if most is None else min(most, least)]

        def reaches(names: Iterable[str]) -> bool:
            return self.drop(names) <= target

        count = fewest(candidates, reaches)
        before = f"the metric is {self.exact:.4g} in float and {self.score(()):.4g} in int8"
        if count is None:
            raise TargetError(
                f"Int8 must lose at most {target:g} points, but {before}, {self.drop(()):.3g} points worse. "
                f"Even with {len(candidates)} of {len(ranked)} layers float it is "
                f"{self.score(candidates):.4g}, {self.drop(candidates):.3g} points worse. "
                f"{_ADVICE if most is None else _ADVICE.replace('target_drop', 'target_drop or max_layers')}"
            )
        found = tuple(needed((), candidates[:count], reaches))
        after = f"with {', '.join(found)} float it is {self.score(found):.4g}"
        result = after if found else "nothing has to stay float"
        rank_zero_info(f"Target of at most {target:g} points: {before}; {result}")
        return found

    def drop(self, names: Iterable[str]) -> float:
        """How many points int8 loses with those layers float."""
        return 100 * self.sign * (self.exact - self.score(names))

    def score(self, names: Iterable[str]) -> float:
        """The metric of int8 with those layers float."""
        kept = frozenset(names)
        if kept not in self.scores:
            simulation = self.int8
            if kept:
                settings = replace(self.settings, keep_float=(*self.settings.keep_float, *sorted(kept)))
                simulation = simulate(self.module, settings, self.calibration, self.int8.inputs)
            simulation.round_with(simulation.grids)
            self.scores[kept] = score(simulation.module, self.metric, self.scored)
        return self.scores[kept]


def ranking(found: Sensitivity) -> list[str]:
    """The layers by what keeping them float gains for their multiply-adds, the most first.

    Those that gain nothing alone may do so together with others: the cheapest of them first.
    """
    worth = sorted(found.layers, key=lambda each: (-max(each.gain, 0) / max(each.macs, 1), each.macs))
    return list(dict.fromkeys(each.name for each in worth))


def fewest(ranked: Sequence[str], reaches: Callable[[Iterable[str]], bool]) -> int | None:
    """How many of the first suffice: more and more are tried, then halves between; None if all do not."""
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
    """Those of `names` that, beside `kept`, are enough and none too many: QuickXplain (Junker 2004)."""
    if not names or reaches(kept):
        return ()
    if len(names) == 1:
        return names
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    later = needed((*kept, *first), second, reaches)
    return (*needed((*kept, *later), first, reaches), *later)
