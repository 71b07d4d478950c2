"""`QuantizationAwareTraining`: the Lightning callback that prepares, trains and converts networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from qat_lightning.analysis.example_batch import prepare_on_batch
from qat_lightning.analysis.preflight.network_report import NetworkReport
from qat_lightning.base.schedule import Phase, Schedule
from qat_lightning.quantize.int8_file import load_int8
from qat_lightning.quantize.networks import Prepared, network_names, prepare_when_loaded
from qat_lightning.quantize.options import ModuleOptions, Settings
from qat_lightning.report.curves import Curves
from qat_lightning.run import checks, messages, trainer_facts
from qat_lightning.run.conversion import convert_on_all_ranks
from qat_lightning.run.distributed.graphs_check import check_same_graphs
from qat_lightning.run.distributed.processes import fail_together
from qat_lightning.run.forwarding import ForwardingCallback
from qat_lightning.run.parts import averaging
from qat_lightning.run.parts.accuracy_target import AccuracyTarget, LayerSearch
from qat_lightning.run.parts.distillation import Distillation, Teaching
from qat_lightning.run.parts.exports import Exports
from qat_lightning.run.parts.first_batch import FirstBatch
from qat_lightning.run.parts.int8_validation import Int8Validation
from qat_lightning.run.parts.nonfinite import NonFiniteGuard
from qat_lightning.run.parts.phases import Phases
from qat_lightning.run.parts.random_states import RandomStates
from qat_lightning.run.parts.ranges import MergedRanges, PausedObservers
from qat_lightning.run.parts.report import RunReport
from qat_lightning.run.step_batches import fit_batches


class QuantizationAwareTraining(ForwardingCallback):
    """Trains a network for int8 and converts it at the end of fit.

    The networks are prepared in `setup(stage="fit")`: before Lightning restores a checkpoint and before
    DistributedDataParallel wraps them. The schedule decides the phase of each epoch and step, so a resumed
    run continues in the right phase. Observers see training batches only. At the end of fit a copy is
    converted on the CPU. The LightningModule itself stays prepared, so `trainer.test(ckpt_path="best")` and
    a second `trainer.fit` work.

    Customise it by argument, or override :meth:`phase_at`. Pass callbacks that average weights after this
    one; docs/compatibility.md lists what else works with it.

    One caveat: in fx mode a network becomes a graph module. It keeps the `forward` and the attributes of the
    original, but no other methods. A LightningModule that has layers itself keeps everything else: only its
    `forward` runs the graph.

    Example::

        qat = QuantizationAwareTraining(backend="x86")
        trainer = Trainer(max_epochs=5, callbacks=[qat])
        trainer.fit(module, datamodule)
        Trainer(accelerator="cpu").test(qat.int8_module, datamodule)

    Args:
        freeze_bn_at: When batch-norm statistics freeze: an epoch (int), a fraction of the run (float below
            1), or None (default) for never. Frozen statistics cost points of accuracy while the learning
            rate is high, in float training too. torchvision's recipe freezes them at a rate of 1e-4.
        freeze_observers_at: When the ranges of the activations freeze, in the same form. Half of the run by
            default: the weights then adapt to ranges that no longer move. Ranges of weights never freeze.
        fake_quant_from: Epoch at which fake-quantization starts. Before it, observers only watch.
        calibration_steps: Steps at the start of the run that train in float while observers watch.
            Fake-quantization starts with the mean of their ranges. At most a twentieth of the run.
        distillation: The teacher whose logits the network learns too. None by default.
        accuracy_target: How much of a metric int8 may lose before training. A few layers stay float to
            reach it. No target by default.
        convert: Weights to convert at the end: `"best"`, those of ModelCheckpoint's best-ranked checkpoint
            with fake-quantization on, or the last if there is none; `"last"`; or None for no conversion.
        export: Formats to write: `"torch"` (`int8.pt`), `"onnx"` (`int8.onnx`), `"openvino"` (`int8.xml`).
            ONNX and OpenVINO files are checked against the fake-quant outputs, and each network has its own,
            such as `int8.generator.onnx`.
        output_dir: Folder for these files; by default the checkpoints' folder.
        preflight: Whether to do a dry run after the first batch, in seconds: a training step, the
            conversion and an int8 forward, on copies of the networks. If one fails, the run stops with an
            error that names the line.
        int8_val_every_n_epochs: Every how many epochs a converted copy is validated on the CPU, by the
            module's own `validation_step`. Its metrics are logged as `val_int8/<metric>`, and fake-quant
            minus int8 as `quantization_gap/<metric>`. A ModelCheckpoint that monitors them needs the same
            `every_n_epochs`.
        report: Whether to write `report.html` and `report.json` and print them: metrics of float, fake-quant
            and each int8 file, sizes, speeds, curves, every layer. Takes about a minute, and memory for one
            more copy of the float module.
        **options: How networks are prepared: backend, modules, keep_float, mode and others, see
            :class:`qat_lightning.ModuleOptions`.

    Attributes:
        int8_module: After fit, the LightningModule with int8 networks, on the CPU in eval mode.
        int8_path: Its `int8.pt`; None if there is none or this rank cannot see the file.
        converted_from: The checkpoint whose weights were converted, or `"last"`.
        exported: All files that were written, as far as this rank can see them.

    Raises:
        ValueError: A value is out of range, or an engine is missing from this build of PyTorch.
        TypeError: A value is of the wrong type, or an argument is unknown.
    """

    def __init__(
        self,
        *,
        freeze_bn_at: int | float | None = None,
        freeze_observers_at: int | float | None = 0.5,
        fake_quant_from: int = 0,
        calibration_steps: int = 8,
        distillation: Distillation | None = None,
        accuracy_target: AccuracyTarget | None = None,
        convert: str | None = "best",
        export: Sequence[str] = ("torch",),
        output_dir: str | Path | None = None,
        preflight: bool = True,
        int8_val_every_n_epochs: int | None = None,
        report: bool = False,
        **options: Unpack[ModuleOptions],
    ) -> None:
        self.settings = Settings.of(options, "QuantizationAwareTraining")
        self.schedule = Schedule(freeze_bn_at, freeze_observers_at, fake_quant_from, calibration_steps)
        checks.check_arguments(convert, output_dir, preflight=preflight, report=report)
        self.convert, self.output_dir = convert, None if output_dir is None else Path(output_dir)
        self.int8_module: pl.LightningModule | None = None
        self.int8_path: Path | None = None
        self.converted_from: str | None = None
        self.exported: list[Path] = []
        self._prepared: list[Prepared] = []
        self._exports = Exports(export)
        traces = self._exports.need_inputs
        self._first_batch = FirstBatch(dry_run=preflight, catch=traces or report, store=traces)
        self._report = RunReport(write=report, first_batch=self._first_batch, shipped=self.shipped)
        self._phases = Phases(self.schedule, self.phase_at, self._report.curves.mark)
        self._search = LayerSearch(accuracy_target)
        super().__init__(
            [
                self._search,
                RandomStates(),
                self._phases,
                NonFiniteGuard(),
                MergedRanges(),
                averaging.Averaging(),
                PausedObservers(),
                Teaching(distillation),
                self._first_batch,
                Int8Validation(int8_val_every_n_epochs),
                self._exports,
                self._report,
            ]
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        checks.check_package(trainer, pl_module)
        if stage != "fit":
            prepare_when_loaded(pl_module, self.settings, keep_as_loaded=self._search.is_set)
            return
        checks.check_run(trainer, pl_module, self)
        for part in self._parts:
            part.check(trainer, pl_module)
        trainer_facts.configure_model(trainer, pl_module)
        with fail_together("preparing the networks"):
            checks.check_output(trainer, self.output_dir)
            names = network_names(pl_module, self.settings)
            for part in self._parts:
                part.before_prepare(trainer, pl_module, names)
        settings = self._search.choose(trainer, pl_module, self.settings, self._networks.values())
        with fail_together("preparing the networks"):
            self._adopt(trainer, pl_module, settings)
        check_same_graphs(self._networks)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle(trainer, pl_module)
        checks.check_prepared(pl_module, self._networks, network_names(pl_module, self.settings))
        super().on_fit_start(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        if self.convert is not None:
            self._convert(trainer, pl_module, self.convert)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._settle(trainer, pl_module)  # a learning-rate finder may save before `on_fit_start`
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {"recipes": {p.name: p.recipe.to_json() for p in self._prepared}, **super().state_dict()}

    @property
    def curves(self) -> Curves:
        """The metrics of each epoch, and the epochs at which phases began."""
        return self._report.curves

    @property
    def preflight_reports(self) -> list[NetworkReport]:
        """The result of the preflight for each network, on rank 0."""
        return self._first_batch.reports

    def phase_at(self, trainer: pl.Trainer) -> Phase:
        """Returns the phase of the next step of `trainer`."""
        return averaging.adapt(trainer, self._phases.planned(trainer))

    def shipped(self, module: pl.LightningModule, path: Path) -> pl.LightningModule:
        """Makes `module` run an exported file instead of its own networks, to score the file.

        Args:
            module: A freshly built float module. It is changed in place.
            path: One of :attr:`exported`.
        """
        if path.suffix == ".pt":
            return load_int8(path, module, qconfig=self.settings.qconfig, overrides=self.settings.overrides)
        return self._exports.shipped(module, path, [*self._networks])

    @property
    def _networks(self) -> dict[str, nn.Module]:
        return {prepared.name: prepared.network for prepared in self._prepared}

    def _adopt(self, trainer: pl.Trainer, pl_module: pl.LightningModule, settings: Settings) -> None:
        self._prepared = prepare_on_batch(pl_module, settings, fit_batches(trainer))
        for part in self._parts:
            part.after_prepare(pl_module, self._networks)
        messages.announce_prepared(self._prepared)

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._search.settle(pl_module):
            self._adopt(trainer, pl_module, self.settings)

    def _convert(self, trainer: pl.Trainer, pl_module: pl.LightningModule, which: str) -> None:
        folder = self.output_dir or trainer_facts.checkpoint_folder(trainer)

        def write(
            module: pl.LightningModule, int8: pl.LightningModule, metrics: dict[str, float]
        ) -> list[Path]:
            if trainer_facts.is_fast_dev_run(trainer):
                return []
            inputs = self._first_batch.inputs
            return self._exports.write(module, int8, [*self._networks], folder, metrics, inputs)

        result = convert_on_all_ranks(trainer, pl_module, which, write, folder)
        self.int8_module, self.converted_from, self.exported = result.module, result.source, [*result.files]
        self.int8_path = next((path for path in self.exported if path.suffix == ".pt"), None)
        files = ", ".join(map(str, self.exported)) or "no file written"
        rank_zero_info(f"Converted to int8 {result.why}: {files}")
        for part in self._parts:
            part.after_conversion(trainer, result, folder)
