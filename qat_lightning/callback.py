"""The Lightning callback: one object that owns the life of a quantization-aware training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from qat_lightning.analysis.preflight.network_report import NetworkReport
from qat_lightning.base.schedule import Phase, ResolvedSchedule, Schedule
from qat_lightning.fake_quant.phases import ObserversOff, average_over, enter, keep_inputs
from qat_lightning.modes.qconfig import Overrides, QConfigLike
from qat_lightning.quantize.int8_file import load_int8
from qat_lightning.quantize.networks import (
    Prepared,
    Settings,
    network_names,
    prepare_module,
    prepare_when_loaded,
)
from qat_lightning.quantize.nonfinite import NonFiniteWatch
from qat_lightning.quantize.selection import FloatPattern
from qat_lightning.report.curves import Curves
from qat_lightning.run import checks, messages, progress, trainer_facts
from qat_lightning.run.conversion import convert_on_all_ranks
from qat_lightning.run.distributed.merge_ranges import keep_out_of_ddp_broadcast, merge_ranges
from qat_lightning.run.distributed.processes import fail_together
from qat_lightning.run.parts import averaging
from qat_lightning.run.parts.accuracy_target import Target
from qat_lightning.run.parts.distillation import Distillation
from qat_lightning.run.parts.exports import Exports
from qat_lightning.run.parts.int8_validation import validate_int8
from qat_lightning.run.parts.preflight import FirstBatch
from qat_lightning.run.parts.random_states import RandomStates
from qat_lightning.run.parts.report import RunReport
from qat_lightning.run.parts.teachers import TeacherLike

_FINITE_EVERY = 50
"""Steps between two looks at the flags of a GPU, each of which waits for it."""


class QuantizationAwareTraining(pl.Callback):
    """Trains a network for int8 and converts it at the end of fit.

    In Lightning 2 the networks must be prepared before a checkpoint is restored and before
    DistributedDataParallel wraps them, so what PyTorch's guide calls "before training" happens in
    `setup(stage="fit")`, before `on_fit_start`. At each epoch start the phase is derived from the
    schedule, so that a resumed run is in the right one. Observers see training batches only. At the
    end of fit a copy is converted on the CPU; the LightningModule itself stays as it was trained,
    so that `trainer.test(ckpt_path="best")` and a second `trainer.fit` work.

    Customise by argument, or by overriding :meth:`phase_at`, which decides the phase. Callbacks that average
    weights come after this one; docs/compatibility.md lists what else works with it.

    One caveat: in fx mode a network becomes a graph, which has `forward` and the attributes of the
    original but no other methods. A LightningModule with layers of its own stays what it is: its
    `forward` runs the graph, and everything else is untouched.

    Example::

        from qat_lightning import QuantizationAwareTraining

        qat = QuantizationAwareTraining(backend="x86")
        trainer = Trainer(max_epochs=5, callbacks=[qat])
        trainer.fit(module, datamodule)
        Trainer(accelerator="cpu").test(qat.int8_module, datamodule)

    Args:
        backend: Engine of the int8 network: `"x86"`, `"fbgemm"`, `"qnnpack"` or `"onednn"`. x86 and
            fbgemm use 7 bits for activations, whose sums fit on CPUs without VNNI; onednn
            and qnnpack use 8, which is more accurate where the CPU has VNNI.
        qconfig: One's own `QConfig` or `QConfigMapping` instead of the backend's default.
        mode: `"fx"` traces the network and finds additions, functional calls and fusions by itself;
            `"eager"` runs its own code, with the QuantStubs its author wrote. `"auto"`: eager where
            there are QuantStubs, else fx.
        modules: Dotted names of the submodules to quantize. By default every child of the
            LightningModule that is a network (a container with convolutions or linear layers).
        keep_float: Names, globs or types of submodules that stay float, inside those networks; in fx
            mode also functions, of which all calls stay float.
        fuse: `"auto"`, or in eager mode groups of module names, as `fuse_modules_qat` takes them.
            Auto finds them in the graph of the network; in eager mode its own `fuse_model` goes first, and
            where a network cannot be traced they are found by running the module's `example_input_array`.
        replace_relu6: Whether ReLU6 becomes ReLU, which int8 fuses into the layer before it.
        overrides: By name or glob, the QConfig of single convolutions and linear layers, the name of a
            backend to use its default, or None to keep them float.
        untraceable: What to do in fx mode with a part whose forward cannot be traced: `"error"` raises
            with its file and line, `"float"` keeps the smallest such parts float, and says so.
        freeze_bn_at: When batch-norm statistics freeze: an epoch (int), a fraction of the run
            (float below 1), or None for never. Never by default: with statistics frozen, a learning
            rate that is still high costs points of accuracy, in float training just the same;
            torchvision's recipe pairs the freeze with a learning rate of 1e-4.
        freeze_observers_at: When the ranges of the activations freeze, given likewise. Half of the run by
            default: the weights settle in ranges that no longer move, and in short and long runs alike the
            observers have seen half of it. A weight's own range is that of the weight, always.
        fake_quant_from: Epoch at which fake-quantization starts; before it observers only watch.
        calibration_steps: Steps at the start of the run that train in float while observers watch:
            fake-quantization starts with the mean of their ranges, not with those of one batch. 8 by default,
            in short runs at most a twentieth of all.
        teacher: Whose logits the network learns beside its labels: `"self"`, the float network with the
            weights that it has when `fit` is called; another float network; or, where there are several
            networks, a mapping of their names to these. It is copied, frozen and in no checkpoint.
            `training_step` stays as it is: the term is added to the gradient of its loss, and logged as
            `train/distillation`.
        teacher_weight: What the divergence from the teacher is multiplied by. 1 by default: as much as a
            cross entropy in the mean over the batch.
        teacher_temperature: What both networks' logits are divided by before the softmax. 1 by default: what
            the network is to reproduce is the float network's own answer, and no softer one.
        target_drop: How many points of a metric int8 may lose before training, of which there are 100 between
            0 and 1: the few layers that this takes stay float, beside `keep_float`. They are searched for at
            the start of fit, on the validation data: see :func:`qat_lightning.keep_for_target`. The module
            has to hold trained weights. A resumed run keeps the layers that it began with.
        target_metric: The metric's name, as `validation_step` logs it; by default what the first
            ModelCheckpoint monitors.
        target_mode: Whether more of it is better, `"max"`, or less, `"min"`; by default as the callback has
            it that monitors it.
        convert: Weights to convert at the end: `"best"`, the best-ranked checkpoint of the
            ModelCheckpoint among those with fake-quantization on, else the last; `"last"`; or None
            for no conversion.
        output_dir: Folder for `int8.pt`; by default the checkpoints' folder.
        preflight: Whether to try, after the first training batch and in seconds, a training step, the
            conversion and an int8 forward on copies of the networks: what could not be converted after hours
            of training is an error then, with its line. See :func:`qat_lightning.preflight`.
        int8_val_every_n_epochs: How often a converted copy is validated on the CPU, with the module's own
            `validation_step`. Its metrics are logged as `val_int8/<metric>`, and what quantization costs as
            `quantization_gap/<metric>`, for ModelCheckpoint and EarlyStopping to monitor. Never by default.
            Beyond 1, give a ModelCheckpoint that monitors them the same `every_n_epochs`.
        export: Files to end with: `"torch"` (`int8.pt`), `"onnx"` (`int8.onnx`), `"openvino"` (`int8.xml`),
            each checked against the fake-quant outputs. The graphs are traced with inputs of the first batch;
            where there are several networks, each has a file of its own, as `int8.generator.onnx`.
        report: Whether to write `report.html` and `report.json` beside them, and to print them as tables:
            the validation metrics of float, fake-quant and each int8 file in its runtime, sizes, speeds, the
            course of the training, every layer. It takes a minute or so on the CPU, and one more copy of the
            float module in memory.

    Attributes:
        int8_module: After fit, the LightningModule with int8 networks, on the CPU in eval mode.
        int8_path: Where it was written; None on a rank that cannot see that file.
        converted_from: The checkpoint whose weights it has, or `"last"`.
        exported: The files that were written and that this rank can see.

    Raises:
        ValueError: A value is out of range, or an engine is missing from this build of PyTorch.
        TypeError: A value is of the wrong type.
    """

    def __init__(
        self,
        *,
        backend: str = "x86",
        qconfig: QConfigLike | None = None,
        mode: str = "auto",
        modules: Sequence[str] | None = None,
        keep_float: Sequence[FloatPattern] = (),
        fuse: str | Sequence[Sequence[str]] = "auto",
        replace_relu6: bool = True,
        overrides: Overrides | None = None,
        untraceable: str = "error",
        freeze_bn_at: int | float | None = None,
        freeze_observers_at: int | float | None = 0.5,
        fake_quant_from: int = 0,
        calibration_steps: int = 8,
        teacher: TeacherLike = None,
        teacher_weight: float = 1.0,
        teacher_temperature: float = 1.0,
        target_drop: float | None = None,
        target_metric: str | None = None,
        target_mode: str | None = None,
        convert: str | None = "best",
        output_dir: str | Path | None = None,
        preflight: bool = True,
        int8_val_every_n_epochs: int | None = None,
        export: Sequence[str] = ("torch",),
        report: bool = False,
    ) -> None:
        self.settings = Settings(
            backend, qconfig, mode, modules, keep_float, fuse, replace_relu6, overrides, untraceable
        )
        self.schedule = Schedule(freeze_bn_at, freeze_observers_at, fake_quant_from, calibration_steps)
        self._distillation = Distillation(teacher, teacher_weight, teacher_temperature)
        self._target = Target(target_drop, target_metric, target_mode)
        if convert not in ("best", "last", None):
            raise ValueError(f"convert must be 'best', 'last' or None, but received {convert!r}.")
        self.convert = convert
        self.output_dir = None if output_dir is None else Path(output_dir)
        if self.output_dir is not None and self.output_dir.is_file():
            raise ValueError(f"output_dir must be a folder, but {self.output_dir} is a file.")
        for name, value in (("preflight", preflight), ("report", report)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, but received {value!r}.")
        self.preflight, self.report = preflight, report
        if int8_val_every_n_epochs is not None and int8_val_every_n_epochs < 1:
            raise ValueError(
                f"int8_val_every_n_epochs must be None or at least 1, but received {int8_val_every_n_epochs}."
            )
        self.int8_val_every_n_epochs = int8_val_every_n_epochs
        self.exports = Exports(export)
        self.int8_module: pl.LightningModule | None = None
        self.int8_path: Path | None = None
        self.converted_from: str | None = None
        self.exported: list[Path] = []
        self._prepared: list[Prepared] = []
        self._resolved: ResolvedSchedule | None = None
        self._phase: Phase | None = None
        self._warned: set[str] = set()
        self._watch = NonFiniteWatch({})
        self._observers_off = ObserversOff()
        self._random_states = RandomStates()
        self._first_batch = FirstBatch()
        self._run_report = RunReport()

    # The life of a run, in Lightning's order.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepares the networks; in stages other than fit only if weights of a QAT run are loaded."""
        checks.check_package(trainer, pl_module)
        if stage != "fit":
            prepare_when_loaded(pl_module, self.settings, keep_as_loaded=self._target.is_set)
            return
        self._resolved = self._phase = None
        self._random_states.clear()
        trainer_facts.check_strategy(trainer)
        checks.check_callbacks(trainer, self)
        checks.check_loggers(trainer, pl_module)
        self.exports.check()
        if math.isinf(trainer_facts.epochs(trainer)) and trainer.max_steps == -1:
            self.schedule.resolve(math.inf)  # raises if the length of the run is needed
        if is_overridden("configure_model", pl_module):
            call._call_configure_model(trainer)  # within the contexts that Lightning uses
        self._run_report.begin(pl_module, keep=self.report and trainer.is_global_zero)
        with fail_together("preparing the networks"):
            checks.check_output(trainer, self.output_dir)
            self._distillation.take(pl_module, network_names(pl_module, self.settings))
        settings = self._target.choose(trainer, pl_module, self.settings, self._networks.values())
        with fail_together("preparing the networks"):
            self._adopt(pl_module, prepare_module(pl_module, settings))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that the prepared networks are the ones that will be trained."""
        self._settle(pl_module)
        present = set(pl_module.modules())
        for prepared in self._prepared:
            if prepared.network not in present:
                raise MisconfigurationException(messages.replaced(prepared.name))
        names = [p.name for p in self._prepared]
        late = [n for n in network_names(pl_module, self.settings) if n not in names]
        if late:
            raise MisconfigurationException(
                f"The network {late[0]!r} appeared after the callback's setup, so it is not prepared for "
                "quantization. Build it in `__init__` or in `configure_model`, not in `setup`."
            )
        averaging.adopt(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolves the schedule, unless a checkpoint brought it."""
        if self._resolved is None:
            self._resolved = self.schedule.resolve(trainer_facts.steps(trainer))
        messages.warn_of_unreached(trainer, self.schedule, self._resolved, self._warned)
        if trainer_facts.is_compiled(pl_module):
            keep_inputs(pl_module)
        self._distillation.start(trainer, pl_module)
        self._random_states.restore_before_validation(trainer)
        if self.preflight or self.exports.need_inputs or self.report:
            self._first_batch.watch(pl_module, self._networks)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enters the phase of this epoch."""
        self._random_states.restore(trainer, epoch_start=True)
        self._enter_phase(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enters the phase of this step."""
        self._random_states.restore(trainer, epoch_start=False)
        if self.phase_at(trainer) != self._phase:
            self._enter_phase(trainer, pl_module)
        self._calibrate(trainer)
        self._distillation.begin_batch()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Lets the teacher's term into the gradient of this loss."""
        self._distillation.begin_backward(trainer, pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps it out of any other gradient."""
        self._distillation.end_backward()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the teacher's term, and tries the networks out with what the first batch gave them."""
        self._distillation.end_batch(trainer, pl_module)
        self._first_batch.try_out(trainer, dry_run=self.preflight)
        self.exports.inputs |= self._first_batch.inputs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records what the epoch logged."""
        self._record(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Raises if a NaN or an infinity was observed, while the weights are still good."""
        if pl_module.device.type == "cpu" or trainer.global_step % _FINITE_EVERY == 0:
            self._watch.check(trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merges the ranks' ranges, and switches observers off for the validation."""
        progress.forget_restart(trainer)
        merge_ranges(pl_module)
        averaging.settle(trainer, pl_module)
        self._observers_off.enter(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validates an int8 copy, in the epochs that were asked for."""
        every = self.int8_val_every_n_epochs
        if every is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if (trainer.current_epoch + 1) % every == 0:
            pl_module.log_dict(validate_int8(trainer, pl_module), sync_dist=trainer.world_size > 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switches observers back to what they were, and records what was logged, before a checkpoint."""
        self._observers_off.leave()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switches observers off for the test."""
        self._observers_off.enter(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switches observers back to what they were."""
        self._observers_off.leave()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switches observers off for the prediction."""
        self._observers_off.enter(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switches observers back to what they were."""
        self._observers_off.leave()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Switches observers back to what they were, if a validation was interrupted."""
        self._observers_off.leave()
        self._first_batch.stop()
        self._distillation.end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merges the ranks' ranges a last time, while the processes can still talk."""
        self._distillation.end()
        merge_ranges(pl_module)
        averaging.settle(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Converts a copy to int8 and writes it."""
        averaging.finish(trainer, pl_module)
        if self.convert is None:
            return
        outcome = convert_on_all_ranks(
            trainer, pl_module, self.convert, partial(self._write, trainer), self._folder(trainer)
        )
        self.int8_module, self.converted_from, self.exported = (
            outcome.module,
            outcome.source,
            [*outcome.files],
        )
        self.int8_path = next((path for path in self.exported if path.suffix == ".pt"), None)
        files = ", ".join(map(str, self.exported)) or "nothing is written"
        rank_zero_info(f"Converted to int8 {outcome.why}: {files}")
        if self.report and outcome.trained is not None and not vars(trainer).get("fast_dev_run"):
            inputs, folder = self.exports.inputs, self._folder(trainer)
            self._run_report.write(trainer, outcome, inputs, [*self._networks], self.shipped, folder)

    # What a checkpoint holds.

    def state_dict(self) -> dict[str, Any]:
        """The recipes, the resolved schedule and the phase, as plain values."""
        return {
            "recipes": {p.name: p.recipe.to_json() for p in self._prepared},
            "schedule": None if self._resolved is None else self._resolved.state_dict(),
            "asked": asdict(self.schedule),
            "phase": None if self._phase is None else self._phase._asdict(),
            "inputs": self.exports.state_dict(),
            "teacher": self._distillation.state_dict(),
            "target": self._target.state_dict(),
            "curves": self._run_report.curves.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the schedule: its steps stay what they were, whatever the new run's length."""
        if state_dict["schedule"] is not None:
            self._resolved = ResolvedSchedule.from_state_dict(state_dict["schedule"])
        self.exports.load_state_dict(state_dict.get("inputs", {}))
        self._distillation.load_state_dict(state_dict.get("teacher"))
        self._target.load_state_dict(state_dict.get("target"))
        self._run_report.resume(state_dict.get("curves"))
        asked = asdict(self.schedule) | state_dict.get("asked", {})
        if asked != asdict(self.schedule):
            rank_zero_warn(
                f"The run was started with the schedule {asked} and keeps it; the one asked for now, "
                f"{asdict(self.schedule)}, has no effect. Start anew from the weights to change it."
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Merges the ranks' ranges, and stores every rank's random state; a NaN gets no checkpoint."""
        self._settle(pl_module)  # a finder of learning rates may save before `on_fit_start`
        with fail_together("looking for a NaN before a checkpoint"):
            self._watch.check(trainer.global_step)
            self._watch.check_weights(trainer.global_step)
        merge_ranges(pl_module)
        averaging.settle(trainer, pl_module)
        self._random_states.save(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the random states until the run is about to train."""
        if trainer.state.fn == "fit":
            self._random_states.load(checkpoint)

    # The verbs.

    @property
    def curves(self) -> Curves:
        """What was logged epoch by epoch, and what began when."""
        return self._run_report.curves

    @property
    def preflight_reports(self) -> list[NetworkReport]:
        """What the preflight found, network by network; on rank 0."""
        return self._first_batch.reports

    def shipped(self, module: pl.LightningModule, path: Path) -> pl.LightningModule:
        """Puts what an exported file holds in the place of the networks of a fresh `module`, to score it.

        Args:
            module: A freshly built float module; it is used up.
            path: One of :attr:`exported`.
        """
        if path.suffix == ".pt":
            return load_int8(path, module, qconfig=self.settings.qconfig, overrides=self.settings.overrides)
        return self.exports.shipped(module, path, [*self._networks])

    def phase_at(self, trainer: pl.Trainer) -> Phase:
        """The phase of the step that `trainer` is about to do."""
        assert self._resolved is not None
        phase = self._resolved.phase(trainer.current_epoch, trainer_facts.steps_done(trainer))
        return averaging.adapt(trainer, phase)

    @property
    def _networks(self) -> dict[str, nn.Module]:
        return {prepared.name: prepared.network for prepared in self._prepared}

    def _adopt(self, pl_module: pl.LightningModule, prepared: list[Prepared]) -> None:
        self._prepared = prepared
        self._distillation.pair(self._networks)
        keep_out_of_ddp_broadcast(pl_module)
        self._watch = NonFiniteWatch(self._networks)
        self._watch.clear()
        for each in prepared:
            rank_zero_info(f"Prepared {each}")
        overflow = messages.overflow(each.recipe for each in prepared)
        if overflow is not None:
            rank_zero_info(overflow)

    def _settle(self, pl_module: pl.LightningModule) -> None:
        if self._target.settle(pl_module):
            self._adopt(pl_module, prepare_module(pl_module, self.settings))

    def _write(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        int8: pl.LightningModule,
        metrics: dict[str, float],
    ) -> list[Path]:
        if vars(trainer).get("fast_dev_run"):
            return []
        return self.exports.write(module, int8, [*self._networks], self._folder(trainer), metrics)

    def _record(self, trainer: pl.Trainer) -> None:
        rate = trainer_facts.highest_learning_rate(trainer)
        self._run_report.curves.record(trainer.current_epoch, trainer.callback_metrics, rate)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return self.output_dir or trainer_facts.checkpoint_folder(trainer)

    def _enter_phase(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before, phase = self._phase, self.phase_at(trainer)
        if before is not None and (before.observe > phase.observe or before.fake_quant < phase.fake_quant):
            merge_ranges(pl_module)
        for prepared in self._prepared:
            enter(prepared.network, phase)
        self._phase = phase
        for what in messages.announce(trainer, before, phase):
            self._run_report.curves.mark(trainer.current_epoch, what)

    def _calibrate(self, trainer: pl.Trainer) -> None:
        """Makes ranges means over the steps of the calibration, and moving averages after it."""
        assert self._resolved is not None
        done, calibrated = trainer_facts.steps_done(trainer), self._resolved.calibrated.step
        if calibrated and done <= calibrated:
            for prepared in self._prepared:
                average_over(prepared.network, done + 1 if done < calibrated else None)
