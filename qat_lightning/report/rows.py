"""Formats the rows of a report's tables, for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qat_lightning.base import formats
from qat_lightning.report.content import Layer, Score


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores, as text. A text without a value is empty.

    Attributes:
        score: The score that the row shows.
        cells: For each metric, its value and its difference from float.
        size: Size of the file.
        ratio: How many times smaller than float the file is.
    """

    score: Score
    cells: tuple[tuple[str, str], ...]
    size: str
    ratio: str


def metric_names(scores: Sequence[Score]) -> list[str]:
    """Returns the names of all metrics, losses last."""
    names = dict.fromkeys(name for score in scores for name in score.metrics)
    return sorted(names, key=lambda name: "loss" in name.lower())


def base_of(scores: Sequence[Score], score: Score) -> Score | None:
    """Returns the float score to compare with: the one on the same runtime, else the first."""
    floats = [each for each in scores if each.network == "float" and each.split == score.split]
    same_runtime = [each for each in floats if each.runtime == score.runtime]
    return next(iter([*same_runtime, *floats]), None)


def score_rows(scores: Sequence[Score]) -> list[ScoreRow]:
    """Returns the rows of the table of scores, in the order of `scores`."""
    return [_score_row(score, base_of(scores, score), metric_names(scores)) for score in scores]


def _score_row(score: Score, base: Score | None, names: Sequence[str]) -> ScoreRow:
    cells = []
    for name in names:
        value = score.metrics.get(name)
        reference = base.metrics.get(name) if base and base is not score else None
        cells.append(
            (
                "" if value is None else formats.metric(name, value),
                "" if value is None or reference is None else formats.difference(name, value, reference),
            )
        )
    ratio = base.bytes / score.bytes if base and base is not score and base.bytes and score.bytes else None
    return ScoreRow(
        score,
        tuple(cells),
        size="" if score.bytes is None else formats.size(score.bytes),
        ratio="" if ratio is None else formats.times(ratio),
    )


def worst_first(layers: Sequence[Layer], attribute: str = "fake_quant_sqnr") -> list[Layer]:
    """Sorts layers by one of their SQNRs, the lowest first; NaN comes before all others."""

    def rank(layer: Layer) -> float:
        value = getattr(layer, attribute)
        return -math.inf if math.isnan(value) else value

    return sorted(layers, key=rank)
