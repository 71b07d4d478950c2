"""Collects what the report of a `qat-train` run needs, with scores on the test split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from qat_lightning.base.inputs import Catcher, Inputs
from qat_lightning.quantize.recipe import quantized_networks
from qat_lightning.report.build import FinishedRun
from qat_lightning.report.content import Score
from qat_lightning.report.curves import Curves
from qat_lightning.run.parts.scores import RUNTIMES, SAMPLES

Caught = dict[str, Inputs]
_ACCURACY = "test/accuracy"


@contextmanager
def caught(module: nn.Module) -> Iterator[Caught]:
    """Yields a dict that gets the inputs of the prepared networks in `module` at the end of the block."""
    networks = {network: name for name, network, _ in quantized_networks(module)}
    found: Caught = {}
    with Catcher(networks, samples=SAMPLES) as catcher:
        yield found
    found |= {networks[network]: inputs for network, inputs in catcher.caught.items()}


def finished_run(
    cfg: DictConfig,
    metrics: Mapping[str, Any],
    trained: nn.Module,
    int8: nn.Module,
    inputs: Caught,
    curves: Curves,
) -> FinishedRun:
    """Collects what the report of a run needs.

    Args:
        cfg: The run's configuration.
        metrics: The content of `metrics.json`.
        trained: The module with the weights that were converted, still prepared.
        int8: The module after conversion.
        inputs: The inputs to run each network on, by the network's name.
        curves: The metrics of every epoch.
    """
    network = str(cfg.model.get("_target_", "")).rpartition(".")[2]
    name = cfg.model.get("name", "")
    return FinishedRun(
        title=" ".join(filter(None, (type(trained).__name__, network, name))),
        source=str(metrics["checkpoint"]),
        trained=trained,
        int8=int8,
        inputs=inputs,
        files=[Path(path) for path in metrics["exported"]],
        scores=list(_scores(metrics)),
        curves=curves,
    )


def _scores(metrics: Mapping[str, Any]) -> Iterator[Score]:
    exported = {Path(path): each for path, each in metrics["exported"].items()}
    rows = [
        ("float", "PyTorch", metrics["float_accuracy"], metrics["float_path"], metrics["float_bytes"]),
        ("int8 without training", "PyTorch", metrics.get("post_training_accuracy"), None, None),
        ("fake-quant", "PyTorch", metrics["fake_quant_accuracy"], None, None),
    ]
    rows += [
        ("int8", RUNTIMES[path.suffix], each["accuracy"], path, each["bytes"])
        for path, each in exported.items()
    ]
    if not any(path.suffix == ".pt" for path in exported):
        rows.append(("int8", "PyTorch", metrics["int8_accuracy"], None, None))
    for network, runtime, accuracy, path, size in rows:
        if accuracy is not None:
            file = Path(path).name if path else None
            yield Score(network, runtime, {_ACCURACY: accuracy}, "test", file, size)
