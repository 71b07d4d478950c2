"""The content of a report as dataclasses, and how `report.json` stores it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

VERSION = 1


@dataclass(frozen=True)
class Machine:
    """The machine that the speeds were measured on.

    Attributes:
        cpu: Model of the CPU.
        features: Its CPU features that matter for int8, such as `avx512_vnni`.
        cores: CPU cores that this process may use.
        threads: Threads that each network ran on.
    """

    cpu: str
    features: tuple[str, ...]
    cores: int
    threads: int


@dataclass(frozen=True)
class Score:
    """The metrics of one network on one runtime.

    Attributes:
        network: `"float"`, `"int8 without training"`, `"fake-quant"` or `"int8"`.
        runtime: `"PyTorch"`, `"ONNX Runtime"` or `"OpenVINO"`.
        metrics: What the module logs, by name.
        split: `"val"` or `"test"`.
        file: The file of the network; None if there is none.
        bytes: Size of the file, or for float of its weights.
    """

    network: str
    runtime: str
    metrics: dict[str, float]
    split: str
    file: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Speed:
    """The speed of one file.

    Attributes:
        name: What was measured: `"float"`, `"int8"`, or the name of a file.
        runtime: As in :class:`Score`.
        batch: Inputs in a call.
        milliseconds: Median duration of a call.
        spread: Half the interquartile range of the durations, in milliseconds.
        speedup: Duration of the baseline divided by this duration, as the median over all rounds. The
            baseline is float on the same runtime, or the first file. None for the baseline itself.
    """

    name: str
    runtime: str
    batch: int
    milliseconds: float
    spread: float
    speedup: float | None = None

    @property
    def per_second(self) -> float:
        """Inputs per second."""
        return 1000 * self.batch / self.milliseconds


@dataclass(frozen=True)
class Epoch:
    """The metrics at the end of one epoch."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Mark:
    """Something that began with an epoch, such as "observers frozen"."""

    epoch: int
    what: str


@dataclass(frozen=True)
class Layer:
    """One int8 layer with weights, measured on one batch.

    In each of its three forms (float, fake-quant and int8), the network computes the layer's input itself.

    Attributes:
        name: Its name in the network.
        kind: The modules that were fused into it, such as `Conv2d+BatchNorm2d+ReLU`.
        fake_quant_sqnr: SQNR of its fake-quant output against its float output, in dB.
        int8_sqnr: SQNR of its int8 output against its fake-quant output, in dB; infinite if they are equal.
        loss: By how many dB the SQNR of fake-quant against float is lower at its output than at its input.
        clipped: Share of its float outputs outside the range that int8 represents, 0 to 1.
        grid: Least and greatest value that its int8 output represents.
        edges: Least and greatest value of its float output.
        counts: Histogram of its float output between `edges`, in bins of equal width.
    """

    name: str
    kind: str
    fake_quant_sqnr: float
    int8_sqnr: float
    loss: float
    clipped: float
    grid: tuple[float, float]
    edges: tuple[float, float]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """What became int8 in one network, and what stays float.

    Attributes:
        name: Its name in the LightningModule, `""` for the LightningModule itself.
        recipe: Backend, mode and qconfig, by these names.
        fused: Number of fused layers of each kind.
        floats: The layers and operations that stay float, each with the reason.
        int8_share: Share of the multiply-adds that int8 layers do, 0 to 1.
        layers: Its int8 layers, in the order in which they run.
    """

    name: str
    recipe: dict[str, str]
    fused: dict[str, int]
    floats: tuple[str, ...]
    int8_share: float
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Report:
    """The whole content of a report.

    Attributes:
        title: What was trained.
        created: Date and time of the report, as `2026-01-31 12:00`.
        source: The checkpoint that was converted, or `"last"`.
        versions: Versions of the packages that were used, by name.
        machine: The machine that the speeds were measured on.
        scores: The metrics of every network and file, float first.
        speeds: The speeds, runtime by runtime, float before int8.
        epochs: The metrics of every epoch.
        marks: What began with which epoch.
        networks: What became int8 in each network.
        findings: What stands out, in sentences, the most important first.
    """

    title: str
    created: str
    source: str
    versions: dict[str, str]
    machine: Machine
    scores: tuple[Score, ...] = ()
    speeds: tuple[Speed, ...] = ()
    epochs: tuple[Epoch, ...] = ()
    marks: tuple[Mark, ...] = ()
    networks: tuple[Network, ...] = ()
    findings: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """Returns the report as JSON. Infinity and NaN become the texts `"inf"`, `"-inf"` and `"nan"`."""
        return json.dumps({"version": VERSION, **_plain(dataclasses.asdict(self))}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads a report that `to_json` wrote.

        Raises:
            ValueError: The text is not a report, or is a report of another version.
        """
        try:
            values = _numbers(json.loads(text))
            version = values.pop("version")
            if version == VERSION:
                return _build(values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"This is not a report of qat-lightning, or it is damaged: {error!r}."
            ) from error
        raise ValueError(
            f"The report has version {version}, but this qat-lightning reads {VERSION}. Rebuild it with "
            "`qat-report --measure`, or read it with the version of qat-lightning that wrote it."
        )


def _build(values: dict[str, Any]) -> Report:
    def several(kind: Any, name: str) -> tuple[Any, ...]:
        return tuple(kind(**each) for each in values.pop(name))

    machine = values.pop("machine")
    networks = [
        Network(
            **{
                **each,
                "floats": tuple(each["floats"]),
                "layers": tuple(_layer(layer) for layer in each["layers"]),
            }
        )
        for each in values.pop("networks")
    ]
    return Report(
        machine=Machine(**{**machine, "features": tuple(machine["features"])}),
        scores=several(Score, "scores"),
        speeds=several(Speed, "speeds"),
        epochs=several(Epoch, "epochs"),
        marks=several(Mark, "marks"),
        networks=tuple(networks),
        findings=tuple(values.pop("findings")),
        **values,
    )


def _layer(values: dict[str, Any]) -> Layer:
    kind: Any = Layer
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
