"""`PostTrainingQuantization`: the Lightning callback that converts a module to int8 without training it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from qat_lightning.analysis.example_batch import prepare_on_batch
from qat_lightning.base import random_state
from qat_lightning.fake_quant.phases import only_observe, set_enabled
from qat_lightning.modes.qconfig import default_qconfig
from qat_lightning.quantize.convert import convert
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.options import ModuleOptions, Settings
from qat_lightning.run import checks
from qat_lightning.run.distributed.merge_ranges import merge_ranges
from qat_lightning.run.step_batches import calibration_batches


class PostTrainingQuantization(pl.Callback):
    """Quantizes a trained module without training it, with ranges calibrated on the validation data.

    It fuses and prepares networks like :class:`qat_lightning.QuantizationAwareTraining`, so the two differ in
    the training alone. The module itself does not change, and `validate` returns its float metrics::

        ptq = PostTrainingQuantization(backend="x86")
        Trainer(callbacks=[ptq], limit_val_batches=16).validate(module, calibration_loader)
        Trainer(accelerator="cpu").test(ptq.int8_module, datamodule)

    Args:
        **options: How networks are prepared, see :class:`qat_lightning.ModuleOptions`. The default `qconfig`
            is the backend's with histogram observers. They weigh clipping against resolution, which matters
            here because no training adapts the weights to the ranges.

    Attributes:
        int8_module: After `validate`, the LightningModule with int8 networks, on the CPU in eval mode.

    Raises:
        ValueError: A value is out of range, or an engine is missing from this build of PyTorch.
        TypeError: An argument is of the wrong type.
    """

    def __init__(self, **options: Unpack[ModuleOptions]) -> None:
        self.settings = Settings.of(options, "PostTrainingQuantization")
        if self.settings.qconfig is None:
            qconfig = default_qconfig(self.settings.backend, "histogram")
            self.settings = replace(self.settings, qconfig=qconfig)
        self.int8_module: pl.LightningModule | None = None
        self._twin: pl.LightningModule | None = None
        self._handles: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepares a copy of the module that runs on the same inputs."""
        checks.check_package(trainer, pl_module)
        if stage != "validate":
            raise MisconfigurationException(
                f"PostTrainingQuantization calibrates in trainer.validate, but the Trainer runs {stage!r}. "
                "Call Trainer(callbacks=[ptq]).validate(module, calibration_loader), and remove the callback "
                "from other Trainers."
            )
        self.int8_module, self._twin = None, copy_of(pl_module)
        with random_state.preserved():
            batches = calibration_batches(trainer)
            names = [each.name for each in prepare_on_batch(self._twin, self.settings, batches)]
        only_observe(self._twin.eval())
        self._handles = [
            pl_module.get_submodule(name).register_forward_pre_hook(
                _Follower(self._twin.get_submodule(name)), with_kwargs=True
            )
            for name in names
        ]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the copy to the module's device."""
        assert self._twin is not None
        with torch.inference_mode(False):  # as in `_Follower`: inference tensors could not be changed later
            self._twin.to(pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Converts the copy."""
        assert self._twin is not None
        twin, self._twin = self._twin, None
        self._stop()
        with torch.inference_mode(False), torch.no_grad(), random_state.preserved():
            merge_ranges(twin)
            set_enabled(twin, observer=False, fake_quant=True)
            self.int8_module = convert(twin)
        rank_zero_info("Converted to int8 after calibration, without training")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Removes the hooks from the module."""
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Follower:
    """A forward pre-hook that runs another network on the same inputs."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # Observers keep tensors. Inference tensors could not be changed later.
        with torch.inference_mode(False), torch.no_grad():
            self.network(*args, **kwargs)
