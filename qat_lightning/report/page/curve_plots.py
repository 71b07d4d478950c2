"""Draws the training curves, one plot for each family of metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    ScalarFormatter,
)

from qat_lightning.base import formats
from qat_lightning.report.content import Epoch, Mark
from qat_lightning.report.page.svg import (
    AMBER,
    BLUE,
    FONT_SIZE,
    GRAY,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SURFACE,
    Margins,
    Plot,
    draw,
    key,
)

MOST_PLOTS = 12
_LOOKS = ((BLUE, False), (ORANGE, False), (GREEN, False), (PURPLE, True), (AMBER, True), (GRAY, True))
_WIDTH, _AXES_HEIGHT, _ROW = 330, 150, 17
_LEFT, _RIGHT, _BOTTOM = 62, 10, 40

_Curve = tuple[list[int], list[float]]


def curve_plots(epochs: Sequence[Epoch], marks: Sequence[Mark]) -> list[Plot]:
    """Draws the logged metrics over the epochs: losses, accuracies, learning rates, then the others.

    Args:
        epochs: The metrics of each epoch.
        marks: What began with which epoch. Each is a vertical line just before its epoch.
    """
    families: dict[str, dict[str, _Curve]] = {}
    for name in dict.fromkeys(name for epoch in epochs for name in epoch.metrics):
        points = [(each.epoch, each.metrics[name]) for each in epochs if name in each.metrics]
        points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
        if points:
            curve = [epoch for epoch, _ in points], [value for _, value in points]
            families.setdefault(_family(name), {})[name] = curve
    first = [each for each in ("Loss", "Accuracy", "Learning rate") if each in families]
    titles = [*first, *(each for each in families if each not in first)]
    plots = [
        _plot(f"curve{index}", title, families[title], marks)
        for index, title in enumerate(titles[:MOST_PLOTS])
    ]
    if left_out := titles[MOST_PLOTS:]:
        plots[-1] = replace(plots[-1], note=f"{len(left_out)} more plots are left out.")
    return plots


def _family(name: str) -> str:
    lower = name.lower()
    if "loss" in lower:
        return "Loss"
    if "acc" in lower:
        return "Accuracy"
    if lower == "lr" or lower.startswith(("lr-", "lr/", "lr_")) or "learning_rate" in lower:
        return "Learning rate"
    stem = name.rpartition("/")[2]
    for prefix in ("train_", "val_", "test_"):
        stem = stem.removeprefix(prefix)
    return stem or name


def _plot(prefix: str, title: str, curves: dict[str, _Curve], marks: Sequence[Mark]) -> Plot:
    shown = dict(list(curves.items())[: len(_LOOKS)])
    last = max(epochs[-1] for epochs, _ in shown.values())
    marks = [mark for mark in marks if mark.epoch <= last]
    margins = Margins(left=_LEFT, top=8 + _ROW * len(marks), right=_RIGHT, bottom=_BOTTOM)

    def paint(axes: Axes) -> None:
        _lines(axes, title, shown)
        low, high = axes.get_xlim()
        right = [mark for mark in marks if mark.epoch - 0.5 < (low + high) / 2]
        left = [mark for mark in marks if mark not in right]
        # In this order, no line crosses the label of another.
        rows = [*sorted(right, key=lambda mark: mark.epoch), *sorted(left, key=lambda mark: -mark.epoch)]
        for row, mark in enumerate(rows):
            _mark(axes, mark, rows_up=len(rows) - row, right=mark in right)

    label = f"{title} over the epochs: {', '.join(shown)}"
    if marks:
        label += "; " + ", ".join(f"{mark.what} from epoch {mark.epoch}" for mark in marks)
    left_out = len(curves) - len(shown)
    return Plot(
        title,
        draw(prefix, label, _WIDTH, margins.top + _AXES_HEIGHT + _BOTTOM, margins, paint),
        note=f"{left_out} more curves are not drawn." if left_out else "",
        keys=()
        if [*shown] == [title]
        else tuple(key(name, *look) for name, look in zip(shown, _LOOKS, strict=False)),
    )


def _lines(axes: Axes, title: str, curves: dict[str, _Curve]) -> None:
    for (epochs, values), (colour, dashed) in zip(curves.values(), _LOOKS, strict=False):
        marker = "o" if len(epochs) <= 30 else ""
        axes.plot(
            *(epochs, values, "--" if dashed else "-"),
            color=colour,
            linewidth=1.8,
            marker=marker,
            markersize=4,
        )
    epochs = [epoch for epochs, _ in curves.values() for epoch in epochs]
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.set_xlabel("epoch")
    if len(set(epochs)) > 8:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    else:
        axes.set_xticks(sorted(set(epochs)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y")
    values = [value for _, values in curves.values() for value in values]
    if title == "Learning rate" and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    _scale(axes, curves, values)


def _scale(axes: Axes, curves: dict[str, _Curve], values: list[float]) -> None:
    """Keeps the numbers on the vertical axis short."""
    if all(formats.is_share(name, value) for name, (_, each) in curves.items() for value in each):
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    elif axes.get_yscale() == "log" or not 0.01 <= max(map(abs, values)) < 1e5:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.number(value)))
    else:
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))


def _mark(axes: Axes, mark: Mark, rows_up: int, right: bool) -> None:
    """Draws a line just before an epoch, with a label in a row of its own above the axes."""
    low, high = axes.get_xlim()
    x = max(mark.epoch - 0.5, low)
    room = (high - x if right else x - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)
    transform = axes.get_xaxis_transform()
    top = 1 + _ROW * rows_up / _AXES_HEIGHT
    axes.plot([x, x], [0, top], ":", color=MUTED, linewidth=1.2, transform=transform, clip_on=False, zorder=1)
    axes.annotate(
        formats.shorten(mark.what, room / FONT_SIZE - 0.5),
        (x, top),
        xytext=(5 if right else -5, -_ROW + 4),
        textcoords="offset points",
        xycoords=transform,
        ha="left" if right else "right",
        color=INK,
        bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 1},
        annotation_clip=False,
    )
