"""Draws the scores, speeds and layers of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qat_lightning.base import formats
from qat_lightning.report.content import Layer, Score, Speed
from qat_lightning.report.page.svg import (
    BLUE,
    FONT_SIZE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RULE,
    Margins,
    Plot,
    draw,
    key,
)
from qat_lightning.report.rows import base_of, metric_names, worst_first

MOST_METRICS = 6
MOST_LAYERS = 30
MOST_HISTOGRAMS = 24
_WIDTH, _ROW, _LABEL_EMS = 440, 19, 20
HISTOGRAM_KEYS = (
    key("inside the int8 range", BLUE),
    key("outside it: clipped", PURPLE),
    key("ends of the int8 range", INK, dashed=True),
)
_COLOURS = {"float": GRAY, "fake-quant": BLUE, "int8": ORANGE}


def score_plots(scores: Sequence[Score]) -> list[Plot]:
    """Draws each metric of each network as dots, to show the distance from float."""
    return [
        _dots(
            f"score{index}",
            name,
            [each for each in scores if math.isfinite(each.metrics.get(name, math.nan))],
        )
        for index, name in enumerate(metric_names(scores)[:MOST_METRICS])
        if any(math.isfinite(each.metrics.get(name, math.nan)) for each in scores)
    ]


def _dots(prefix: str, name: str, scores: Sequence[Score]) -> Plot:
    values = [score.metrics[name] for score in scores]
    labels = [f"{score.network}, {score.runtime}" for score in scores]
    texts = [formats.metric(name, value) for value in values]
    base = next(
        (value for score, value in zip(scores, values, strict=True) if base_of(scores, score) is score), None
    )
    # The axis spans at least 4 % of the value, or a rounding difference would look like a cliff.
    middle, span = (min(values) + max(values)) / 2, max(values) - min(values)
    reach = max(0.6 * span, 0.02 * abs(middle)) or 1

    def paint(axes: Axes) -> None:
        _rows(axes, labels)
        axes.set_xlim(middle - reach, middle + reach)
        axes.hlines(range(len(values)), middle - reach, middle + reach, color=RULE, linewidth=0.7)
        if base is not None:
            axes.axvline(base, color=GRAY, linewidth=1.2, linestyle=":")
        for row, (score, value, text) in enumerate(zip(scores, values, texts, strict=True)):
            axes.plot(value, row, "o", color=_COLOURS.get(score.network, GREEN), markersize=8)
            _beside(axes, text, middle + reach, row)

    label = f"{name}: " + "; ".join(f"{who} {text}" for who, text in zip(labels, texts, strict=True))
    svg = _row_plot(prefix, label, labels, paint, right=_word_width(texts))
    return Plot(name, svg, note="" if base is None else "The dotted line is float.")


def speed_plots(speeds: Sequence[Speed]) -> list[Plot]:
    """Draws the speeds: the duration of a call for single inputs, inputs per second for larger batches."""
    ordered = sorted(speeds, key=lambda speed: speed.batch)
    return [
        _speeds(f"speed{batch}", batch, list(group))
        for batch, group in groupby(ordered, lambda speed: speed.batch)
    ]


def _speeds(prefix: str, batch: int, speeds: Sequence[Speed]) -> Plot:
    single = batch == 1
    values = [speed.milliseconds if single else speed.per_second for speed in speeds]
    spreads = [value * speed.spread / speed.milliseconds for value, speed in zip(values, speeds, strict=True)]
    labels = [f"{speed.runtime}, {speed.name}" for speed in speeds]
    texts = [
        (f"{formats.milliseconds(value)} ms" if single else f"{value:,.0f} /s")
        + (f", {formats.times(speed.speedup)}" if speed.speedup is not None else "")
        for value, speed in zip(values, speeds, strict=True)
    ]
    colours = [_COLOURS.get(speed.name, GREEN) for speed in speeds]
    title = f"Batch {batch}: " + ("milliseconds per call" if single else "inputs per second")
    label = f"{title}: " + "; ".join(f"{who} {text}" for who, text in zip(labels, texts, strict=True))
    svg = _bars(prefix, label, labels, values, texts, colours, spreads)
    return Plot(title, svg, note="Shorter is better." if single else "Longer is better.")


def layer_plots(prefix: str, layers: Sequence[Layer]) -> list[Plot]:
    """Draws the SQNRs of the worst layers: fake-quant against float, and int8 against fake-quant.

    Args:
        prefix: Begins the ids in the SVG; differs between the networks of a report.
        layers: The layers of one network.
    """
    plots = []
    for attribute, title, colour in (
        ("fake_quant_sqnr", "Fake-quant against float, dB", BLUE),
        ("int8_sqnr", "Int8 against fake-quant, dB", ORANGE),
    ):
        values = {layer.name: getattr(layer, attribute) for layer in worst_first(layers, attribute)}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if not finite:
            continue
        shown = dict(list(finite.items())[:MOST_LAYERS])
        texts = [formats.decibels(value) for value in shown.values()]
        label = f"{title}: " + "; ".join(f"{name} {text}" for name, text in zip(shown, texts, strict=True))
        svg = _bars(
            f"{prefix}{attribute}", label, list(shown), list(shown.values()), texts, [colour] * len(shown)
        )
        exact = sum(value == math.inf for value in values.values())
        plots.append(Plot(title, svg, note=_layers_note(len(shown), len(values), exact)))
    return plots


def _layers_note(shown: int, total: int, exact: int) -> str:
    heading = f"The {shown} worst of {total} layers" if shown < total else "All layers"
    return f"{heading}, the worst first" + (f"; {exact} are exact." if exact else ".")


def histograms(prefix: str, layers: Sequence[Layer]) -> list[Plot]:
    """Draws histograms of the worst layers' float outputs, and the range that int8 can represent.

    Args:
        prefix: As in `layer_plots`.
        layers: The layers of one network.
    """
    drawn = [
        layer
        for layer in worst_first(layers, "fake_quant_sqnr")
        if sum(layer.counts) and all(map(math.isfinite, (*layer.edges, *layer.grid)))
    ]
    return [_histogram(f"{prefix}hist{index}", layer) for index, layer in enumerate(drawn[:MOST_HISTOGRAMS])]


def _histogram(prefix: str, layer: Layer) -> Plot:
    low, high = layer.edges
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, len(layer.counts) + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    # The heights are logarithmic, because most outputs are near zero and the tails get clipped.
    heights = np.log1p(np.array(layer.counts, dtype=float))
    beyond = (centres < layer.grid[0]) | (centres > layer.grid[1])

    def paint(axes: Axes) -> None:
        axes.stairs(np.where(beyond, 0, heights), edges, fill=True, color=BLUE)
        axes.stairs(np.where(beyond, heights, 0), edges, fill=True, color=PURPLE)
        for end in layer.grid:
            axes.axvline(end, color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
        first, last = min(low, layer.grid[0]), max(high, layer.grid[1])
        margin = 0.03 * (last - first) or 1
        axes.set_xlim(first - margin, last + margin)
        axes.set_ylim(0, 1.05 * heights.max())
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.number(value, ".4g")))

    clipped = f"{formats.share(layer.clipped)} % clipped"
    ends = " to ".join(formats.number(end) for end in layer.grid)
    label = f"Histogram of the float output of {layer.name}; int8 range {ends}, {clipped}"
    note = f"{formats.decibels(layer.fake_quant_sqnr)} dB, {clipped}"
    return Plot(layer.name, draw(prefix, label, 240, 100, Margins(12, 6, 12), paint), note)


def _bars(
    prefix: str,
    label: str,
    labels: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    colours: Sequence[str],
    spreads: Sequence[float] | None = None,
) -> str:
    """Draws horizontal bars from zero, each with its value at its end."""
    room = _WIDTH - _label_width(labels) - 8
    ends = [
        max(value + spread, 0) for value, spread in zip(values, spreads or [0.0] * len(values), strict=True)
    ]
    # Leaves room for the text at the end of the longest bar.
    high = max(end * room / (room - _word_width([text])) for end, text in zip(ends, texts, strict=True)) or 1
    low = min(0.0, 1.1 * min(values))

    def paint(axes: Axes) -> None:
        _rows(axes, labels)
        axes.set_xlim(low, high)
        axes.barh(range(len(values)), values, height=0.62, color=colours)
        if spreads:
            ranges = [(value - spread, value + spread) for value, spread in zip(values, spreads, strict=True)]
            axes.hlines(range(len(values)), *zip(*ranges, strict=True), color=INK, linewidth=1.5)
        for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
            _beside(axes, text, end, row)

    return _row_plot(prefix, label, labels, paint)


def _row_plot(
    prefix: str, label: str, labels: Sequence[str], paint: Callable[[Axes], None], right: float = 8
) -> str:
    margins = Margins(left=_label_width(labels), top=2, right=right, bottom=2)
    return draw(prefix, label, _WIDTH, len(labels) * _ROW + 4, margins, paint)


def _label_width(labels: Sequence[str]) -> float:
    return FONT_SIZE * max(min(formats.breadth(label), _LABEL_EMS) for label in labels) + 8


def _word_width(texts: Sequence[str]) -> float:
    return FONT_SIZE * max(map(formats.breadth, texts)) + 8


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """Sets a row for each label, the first on top. There is no value axis: values stand beside the marks."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [formats.shorten(label, _LABEL_EMS) for label in labels])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _beside(axes: Axes, text: str, x: float, row: int) -> None:
    axes.annotate(text, (x, row), xytext=(6, 0), textcoords="offset points", va="center_baseline")
