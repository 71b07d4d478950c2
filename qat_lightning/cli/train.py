"""The command `qat-train`: trains the network of a Hydra configuration, and converts it to int8."""

from __future__ import annotations

import io
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import nn

from qat_lightning.analysis.preflight.preflight import preflight_with
from qat_lightning.analysis.scoring import lone_trainer, score_on_test
from qat_lightning.base import random_state
from qat_lightning.base.atomic import replacing
from qat_lightning.cli import resolvers
from qat_lightning.cli.auto_resume import METRICS, SameStart, Start, find_start, save_config
from qat_lightning.cli.console import ignore_advice, percent, print_preflight, print_results
from qat_lightning.cli.float_first import weights_of_float_run
from qat_lightning.cli.float_weights import load_weights
from qat_lightning.cli.hydra_internals import accept_lazy_help
from qat_lightning.cli.launch import leave_process_group, one_job, pass_on
from qat_lightning.cli.lock import sole_writer
from qat_lightning.cli.report_of_run import Caught, caught, finished_run
from qat_lightning.export.load import size_of
from qat_lightning.post_training import PostTrainingQuantization
from qat_lightning.quantize.recipe import refuse_prepared_states
from qat_lightning.report.build import FinishedRun, publish
from qat_lightning.run.requeue import RequeueBetweenSteps

resolvers.register()
accept_lazy_help()

log = logging.getLogger(__name__)

Metrics = dict[str, Any]
_CALIBRATION = 16
"""Number of validation batches on which int8 without training is calibrated."""


@hydra.main(version_base="1.3", config_path="pkg://qat_lightning.conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Runs :func:`train` on the command line's configuration, and prints the results.

    Returns:
        The test accuracy, for a Hydra sweeper to maximise: that of int8, or in a float run that of float.
    """
    ignore_advice()
    metrics = train(cfg)
    if not metrics:
        return None
    print_results(metrics)
    accuracy: float | None = metrics["int8_accuracy"] or metrics["float_accuracy"]
    return accuracy


def train(cfg: DictConfig) -> Metrics:
    """Trains, converts and scores one configuration.

    Args:
        cfg: The configuration that was composed from `train.yaml`. All files go to `cfg.output_dir`.

    Returns:
        The content of `metrics.json`. A value is None if this run does not have it. The result is empty with
        `preflight=only`, and in a distributed run on all processes but the first. Accuracies are on the whole
        test split, from 0 to 1:

        - `float_accuracy`: of the starting weights, or with `backend=float` of the best epoch;
        - `post_training_accuracy`: of the starting weights in int8, calibrated and not trained;
        - `fake_quant_accuracy`: of the converted weights, in simulated int8;
        - `int8_accuracy`: of the int8 network, on the CPU;
        - `float_bytes`, `int8_bytes`: sizes of the weight files;
        - `checkpoint`: the checkpoint that was scored, or `last` for the weights at the end;
        - `float_path`, `int8_path`: the weight files;
        - `exported`: for each int8 file its `accuracy` in its runtime and its `bytes`.

    Raises:
        ValueError: `num_classes` differs from the data, `preflight=only` comes with `backend=float`, or
            `resume` is wrong.
        RuntimeError: Another process is writing to the output folder, or the float run before this one fails.
        Exception: A constructor that `cfg` names raises it.
    """
    if cfg.float_first is not None and cfg.weights is None and cfg.preflight != "only":
        cfg.weights = weights_of_float_run(cfg)
    start = find_start(cfg)
    if start.metrics is not None:
        return start.metrics if getattr(rank_zero_only, "rank", 0) == 0 else {}
    alone = nullcontext() if cfg.preflight == "only" else sole_writer(start.folder)
    with one_job(), alone:
        _start_from(start, cfg)
        seed_everything(cfg.seed, workers=True, verbose=False)
        data: LightningDataModule = instantiate(cfg.data, _convert_="all")
        _check_classes(cfg.num_classes, data)
        classifier: LightningModule = instantiate(cfg.classifier, _convert_="all")
        qat = _callback(cfg)
        if qat is None:
            refuse_prepared_states(classifier)
        if cfg.preflight == "only":
            _preflight(qat, classifier, data)
            return {}
        trainer = _trainer(cfg, [SameStart(start), RequeueBetweenSteps(), *([qat] if qat else [])])
        if trainer.is_global_zero:
            save_config(cfg, start)
        metrics = _start(cfg, qat, classifier, data, trainer)
        _fit(trainer, classifier, data, cfg.ckpt_path)
        leave_process_group()
        if not trainer.is_global_zero:
            return {}
        if qat is None:
            metrics |= _finish_float(Path(cfg.output_dir), classifier, data, trainer)
        else:
            found, inputs = _finish_quantized(qat, classifier, data, trainer)
            metrics |= found
            metrics["exported"] = _score_files(cfg, qat, data, trainer)
        _write(cfg, metrics)
        if cfg.report and qat is not None and qat.int8_module is not None:
            _report(finished_run(cfg, metrics, classifier, qat.int8_module, inputs, qat.curves), cfg)
        return metrics


def _callback(cfg: DictConfig) -> Any:
    """Builds the callback, or returns None with `backend=float`."""
    if cfg.preflight not in (True, False, "only"):
        raise ValueError(f"preflight must be true, false or only, but received {cfg.preflight!r}.")
    if cfg.quantization._target_ is None:
        return None
    return instantiate(cfg.quantization, preflight=bool(cfg.preflight), _convert_="all")


def _start_from(start: Start, cfg: DictConfig) -> None:
    """Sets the folder and the checkpoint to start from, in this process and in the others."""
    if cfg.resume is None:
        return
    found = {"output_dir": str(start.folder), "ckpt_path": start.checkpoint} if start.checkpoint else {}
    for name, value in found.items():
        cfg[name] = value
    if HydraConfig.initialized():
        pass_on(resume=None, **found)


def _trainer(cfg: DictConfig, callbacks: list[Callback]) -> Trainer:
    configured = [instantiate(each, _convert_="all") for each in cfg.callbacks.values() if each]
    build = instantiate(cfg.trainer, _partial_=True, _convert_="all")
    trainer: Trainer = build(callbacks=[*configured, *callbacks])
    return trainer


def _preflight(qat: Any, classifier: LightningModule, data: LightningDataModule) -> None:
    """Runs the preflight on the first training batch, and prints the result."""
    if qat is None:
        raise ValueError("preflight=only tries int8, but backend=float has no int8. Choose another backend.")
    data.prepare_data()
    data.setup("fit")
    images = next(iter(data.train_dataloader()))[0]
    print_preflight(preflight_with(qat.settings, classifier, images))


def _start(
    cfg: DictConfig, qat: Any, classifier: LightningModule, data: LightningDataModule, trainer: Trainer
) -> Metrics:
    """Loads the starting weights, and scores them in float and in int8 without training."""
    network = _network(classifier)
    accuracies = ("float", "post_training", "fake_quant", "int8")
    metrics: Metrics = dict.fromkeys(f"{name}_accuracy" for name in accuracies)
    metrics |= {"float_bytes": _file_size(network), "int8_bytes": None, "checkpoint": None}
    metrics |= {"float_path": cfg.weights, "int8_path": None}
    if cfg.weights is not None:
        load_weights(network, cfg.weights)
        if trainer.is_global_zero:
            metrics["float_accuracy"] = _evaluate_like(trainer, classifier, data)
            log.info(f"Starting from {cfg.weights}: {percent(metrics['float_accuracy'])}.")
            if cfg.post_training and qat is not None:
                metrics["post_training_accuracy"] = _without_training(qat, classifier, data, trainer)
    return metrics


def _fit(trainer: Trainer, module: LightningModule, data: LightningDataModule, path: str | None) -> None:
    """Trains. A checkpoint is set on the Trainer, because callbacks read it in their `setup`."""
    if path is not None and Path(path).is_file():
        trainer.ckpt_path, path = path, None
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)


def _without_training(
    qat: Any, classifier: LightningModule, data: LightningDataModule, trainer: Trainer
) -> float:
    """Returns the accuracy of int8 without training, calibrated on the first validation batches."""
    ptq = PostTrainingQuantization(**vars(qat.settings))
    limit = trainer.limit_val_batches
    batches = min(limit, _CALIBRATION) if isinstance(limit, int) else _CALIBRATION
    with random_state.preserved():
        alone = lone_trainer(callbacks=[ptq], limit_val_batches=batches)
        alone.validate(classifier, datamodule=data, verbose=False)
    assert ptq.int8_module is not None
    return score_on_test(ptq.int8_module, data, limit_test_batches=trainer.limit_test_batches)


def _finish_float(
    output_dir: Path, classifier: LightningModule, data: LightningDataModule, trainer: Trainer
) -> Metrics:
    """Scores and writes the best epoch's weights."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or "last"
    _load_checkpoint(classifier, best)
    path = output_dir / "float.pt"
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(_network(classifier).state_dict(), file)
    accuracy = _evaluate_like(trainer, classifier, data)
    return {"float_accuracy": accuracy, "checkpoint": best, "float_path": str(path)}


def _finish_quantized(
    qat: Any, classifier: LightningModule, data: LightningDataModule, trainer: Trainer
) -> tuple[Metrics, Caught]:
    """Scores the converted weights in fake-quant and in int8, and returns the networks' inputs, too."""
    checkpoint = str(qat.converted_from or "last")
    _load_checkpoint(classifier, checkpoint)
    metrics: Metrics = {"checkpoint": checkpoint}
    with caught(classifier) as inputs:
        metrics["fake_quant_accuracy"] = _evaluate_like(trainer, classifier, data)
    if qat.int8_module is not None:
        limit = trainer.limit_test_batches
        metrics["int8_accuracy"] = score_on_test(qat.int8_module, data, limit_test_batches=limit)
    if qat.int8_path is not None:
        metrics["int8_path"] = str(qat.int8_path)
        metrics["int8_bytes"] = qat.int8_path.stat().st_size
    return metrics, inputs


def _score_files(
    cfg: DictConfig, qat: Any, data: LightningDataModule, trainer: Trainer
) -> dict[str, dict[str, Any]]:
    """Scores the exported files, each in its own runtime."""
    scores = {}
    for path in qat.exported:
        module = qat.shipped(instantiate(cfg.classifier, _convert_="all"), path)
        accuracy = score_on_test(module, data, limit_test_batches=trainer.limit_test_batches)
        scores[str(path)] = {"accuracy": accuracy, "bytes": size_of(path)}
    return scores


def _report(run: FinishedRun, cfg: DictConfig) -> None:
    """Writes and prints the report. A failure is only a warning, so that the run keeps its results."""
    try:
        log.info(f"Report: {publish(run, Path(cfg.output_dir))}")
    except Exception as error:
        log.warning(
            f"The report could not be made: {error} ({type(error).__name__}). All other files are written. "
            f"To try again: qat-report {cfg.output_dir}"
        )


def _evaluate_like(trainer: Trainer, classifier: LightningModule, data: LightningDataModule) -> float:
    return score_on_test(
        classifier,
        data,
        device=trainer.strategy.root_device,
        precision=trainer.precision,
        limit_test_batches=trainer.limit_test_batches,
    )


def _load_checkpoint(classifier: LightningModule, checkpoint: str) -> None:
    if checkpoint != "last":
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        classifier.load_state_dict(content["state_dict"])


def _write(cfg: DictConfig, metrics: Metrics) -> None:
    text = json.dumps(metrics, indent=2)
    with replacing(Path(cfg.output_dir) / METRICS) as partial:
        partial.write_text(text + "\n")


def _network(classifier: LightningModule) -> nn.Module:
    """Returns the part of the LightningModule that `weights` are loaded into: `network`, or all of it."""
    return getattr(classifier, "network", classifier)


def _file_size(network: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.tell()


def _check_classes(num_classes: int, data: LightningDataModule) -> None:
    found = getattr(data, "num_classes", num_classes)
    if found != num_classes:
        raise ValueError(
            f"num_classes must be the number of classes in the data, but {type(data).__name__} has {found} "
            f"and num_classes is {num_classes}. Set num_classes={found}."
        )
