"""The result of `sensitivity`: the cost of int8 in each layer, as values, a table, a plot and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from qat_lightning.base import formats

_MOST = 120.0
"""Decibels from which outputs count as equal when two ratios are compared."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What int8 costs in one layer: the rounding of its weight and of its output.

    Attributes:
        name: The layer's name in the network.
        network: The network's name in the LightningModule, `""` for the module itself.
        kind: The modules that are fused in the layer, such as `Conv2d+BatchNorm2d+ReLU`.
        macs: Multiply-adds for one sample.
        alone_sqnr: SQNR of the network's outputs against float, in dB, with only this layer quantized.
        kept_sqnr: SQNR of the outputs with everything but this layer quantized.
        gain: By how many dB `kept_sqnr` exceeds the SQNR with everything quantized.
        alone_metric: The metric with only this layer quantized; None if no metric was given.
        kept_metric: The metric with everything but this layer quantized; None if no metric was given.
    """

    name: str
    network: str
    kind: str
    macs: int
    alone_sqnr: float
    kept_sqnr: float
    gain: float
    alone_metric: float | None = None
    kept_metric: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What int8 costs, layer by layer.

    Attributes:
        layers: The layers, most sensitive first: by `alone_metric` if there is one, then by `alone_sqnr`.
        int8_sqnr: For each network, by name, the SQNR of its outputs against float, in dB, with everything
            quantized.
        others_sqnr: The SQNR with only the fake-quantizes on that belong to no layer, such as those of inputs
            and sums.
        float_metric: The metric with nothing quantized; None if no metric was given.
        int8_metric: The metric with everything quantized; None if no metric was given.
    """

    layers: tuple[LayerSensitivity, ...]
    int8_sqnr: dict[str, float]
    others_sqnr: dict[str, float]
    float_metric: float | None = None
    int8_metric: float | None = None

    def table(self) -> Table:
        """Returns the layers as a table for `rich`. Multiply-adds are in millions (MMACs)."""
        scored = self.float_metric is not None
        table = Table(title=self._title())
        table.add_column("layer", overflow="fold")
        table.add_column("kind")
        columns = ["MMACs", "int8 alone, dB", "float alone, dB", "gain, dB"]
        for column in columns + ["int8 alone, metric", "float alone, metric"] * scored:
            table.add_column(column, justify="right")
        for each in self.layers:
            ratios = map(formats.decibels, (each.alone_sqnr, each.kept_sqnr))
            metrics = [formats.digits(v, 4) for v in (each.alone_metric, each.kept_metric) if v is not None]
            gain = formats.number(each.gain, "+.1f")
            table.add_row(_label(each), each.kind, f"{each.macs / 1e6:,.2f}", *ratios, gain, *metrics)
        return table

    def plot(self, path: str | Path) -> None:
        """Writes a plot of the layers, most sensitive on top. The path's suffix decides the format.

        A second panel shows the metric, if there is one.
        """
        from matplotlib.figure import Figure

        scored = self.float_metric is not None
        figure = Figure(figsize=(7 + 3 * scored, 1.5 + 0.22 * len(self.layers)), layout="constrained")
        axes = figure.subplots(1, 1 + scored, sharey=True, squeeze=False)[0]
        names = [formats.printable(_label(each)) for each in self.layers]
        axes[0].set_yticks(range(len(names)), names, parse_math=False)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        ratios = [[min(r, _MOST) for r in (each.alone_sqnr, each.kept_sqnr)] for each in self.layers]
        _draw(axes[0], ratios, {min(ratio, _MOST) for ratio in self.int8_sqnr.values()})
        axes[0].set_xlabel("outputs against float, dB")
        axes[0].legend()
        if scored:
            _draw(axes[1], [[e.alone_metric, e.kept_metric] for e in self.layers], {self.int8_metric})
            axes[1].set_xlabel("metric")
        figure.savefig(path)

    def to_json(self) -> str:
        """Returns everything as JSON. An infinite ratio, for equal outputs, becomes null."""
        return json.dumps(_finite(asdict(self)), indent=2, allow_nan=False)

    def _title(self) -> str:
        lines = [
            f"{name} everything int8: {formats.decibels(ratio)} dB; inputs, sums and the like alone: "
            f"{formats.decibels(self.others_sqnr[name])} dB".strip()
            for name, ratio in self.int8_sqnr.items()
        ]
        if self.float_metric is not None and self.int8_metric is not None:
            metrics = (formats.digits(value, 4) for value in (self.float_metric, self.int8_metric))
            lines.append("metric: {} in float, {} with everything int8".format(*metrics))
        return "\n".join(lines)


def gained(ratio: float, base: float) -> float:
    """Returns by how many decibels `ratio` exceeds `base`."""
    return min(ratio, _MOST) - min(base, _MOST)


def _draw(axes: Any, pairs: Sequence[Sequence[float | None]], everything: Collection[float | None]) -> None:
    """Draws a row for each layer, with its two values, and a vertical line for each value of `everything`."""
    rows = range(len(pairs))
    axes.plot([alone for alone, _ in pairs], rows, "o", markersize=4, label="int8 alone")
    axes.plot([kept for _, kept in pairs], rows, "s", markersize=4, label="float alone")
    for value in everything:
        axes.axvline(value, color="gray", linestyle=":", label="everything int8")
    axes.grid(axis="x", linewidth=0.5)


def _label(layer: LayerSensitivity) -> str:
    return f"{layer.network}.{layer.name}".strip(".")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
