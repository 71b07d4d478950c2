"""The content of a report, as the values in `report.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

VERSION = 1


@dataclass(frozen=True)
class Machine:
    """Where the speeds were measured.

    Attributes:
        cpu: Model of the CPU.
        features: What it has for int8, such as `avx512_vnni`.
        cores: CPU cores that this process may use.
        threads: Threads that each network ran on.
    """

    cpu: str
    features: tuple[str, ...]
    cores: int
    threads: int


@dataclass(frozen=True)
class Score:
    """The metrics of one network.

    Attributes:
        network: `"float"`, `"int8 without training"`, `"fake-quant"` or `"int8"`.
        runtime: `"PyTorch"`, `"ONNX Runtime"` or `"OpenVINO"`.
        metrics: What the module logs, by name.
        split: `"val"` or `"test"`.
        file: The file that was scored; None where none was.
        bytes: Size of its file, or for float of its weights.
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
        name: What was run: `"float"`, `"int8"`, or the name of a file.
        runtime: As in :class:`Score`.
        batch: Inputs in a call.
        milliseconds: Median duration of a call.
        spread: Half the distance of its quartiles, in milliseconds.
        speedup: Median over the rounds of the duration of the baseline (float on the same runtime, or the
            first file) over this one's; None for the baseline itself.
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
    """One int8 layer with weights, on the inputs of one batch.

    Attributes:
        name: Its name in the network.
        kind: Its layers, such as `Conv2d+BatchNorm2d+ReLU`.
        fake_quant_sqnr: Its fake-quant output against its float output, in dB; each network fed by itself.
        int8_sqnr: Its int8 output against its fake-quant output, in dB; infinite where they are equal.
        loss: How many dB lower `fake_quant_sqnr` is than that of what the layer reads.
        clipped: Share of its float outputs that lie beyond its grid, 0 to 1.
        grid: Least and greatest value of its grid.
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
    """The inventory of one network.

    Attributes:
        name: Its name in the LightningModule, `""` for the module itself.
        recipe: Backend, mode and qconfig, by these names.
        fused: Number of fused layers of each kind.
        floats: What stays float, each with its reason.
        int8_share: Share of the multiply-adds that is int8, 0 to 1.
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
    """Everything.

    Attributes:
        title: What was trained.
        created: When, as `2026-01-31 12:00`.
        source: The checkpoint that was converted, or `"last"`.
        versions: Of the packages that took part.
        machine: Where the speeds were measured.
        scores: Float first.
        speeds: Runtime by runtime, float before int8.
        epochs: The curves of the training.
        marks: What began when.
        networks: The inventory of each network.
        findings: What stands out, in words, the most important first.
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
        """Returns JSON. It has no infinity or NaN, so these become the texts `"inf"`, `"-inf"`, `"nan"`."""
        return json.dumps({"version": VERSION, **_plain(dataclasses.asdict(self))}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: It is no report, or one of a later version.
        """
        try:
            values = _numbers(json.loads(text))
            version = values.pop("version")
            if version == VERSION:
                return _build(values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"This is no report of qat-lightning, or a damaged one: {error!r}.") from error
        raise ValueError(
            f"The report has version {version}, and this qat-lightning reads {VERSION}. Rebuild it with "
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
