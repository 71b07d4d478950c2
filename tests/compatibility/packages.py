"""The packages around Lightning: its command line, and its older name."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from qat_lightning import QuantizationAwareTraining
from qat_lightning.run import trainer_facts
from tests.compatibility.registry import Section
from tests.compatibility.runs import Run, callback, check
from tests.networks import Residual
from tests.runs import TinyModule, loader, trainer

row = Section("Packages")

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  logger: false
  max_epochs: 2
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: {folder}
  callbacks:
    - class_path: qat_lightning.QuantizationAwareTraining
      init_args:
        backend: onednn
        qconfig: null
        mode: fx
        modules: [model]
        keep_float: [fc, operator.add()]
        fuse: auto
        replace_relu6: true
        overrides: {{stem.0: null, block.0: qnnpack}}
        untraceable: float
        freeze_bn_at: {freeze_bn_at}
        freeze_observers_at: {freeze_observers_at}
        fake_quant_from: 0
        calibration_steps: 8
        convert: last
        output_dir: {folder}/int8
        preflight: true
model:
  lr: 0.01
"""


@row(
    "LightningCLI",
    "python main.py fit --config config.yaml",
    "works; the file can set every argument of the callback; there, `keep_float` takes names, globs and "
    "functions by name, but no types",
)
def lightning_cli(folder: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    points: list[tuple[Any, Any]] = [(None, 0.5), (1, 0.25), (0.5, None)]
    for freeze_bn_at, freeze_observers_at in points:
        values = {"freeze_bn_at": freeze_bn_at, "freeze_observers_at": freeze_observers_at}
        written = {name: "null" if value is None else value for name, value in values.items()}
        file = folder / "config.yaml"
        file.write_text(CONFIG.format(folder=folder, **written))
        arguments = ["main.py", "fit", "--config", str(file)]
        with mock.patch.object(sys, "argv", arguments), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # jsonargparse's, of Lightning
            cli = LightningCLI(TinyModule, save_config_callback=None)
        qat: Any = next(
            c for c in trainer_facts.callbacks(cli.trainer) if isinstance(c, QuantizationAwareTraining)
        )
        assert (qat.schedule.freeze_bn_at, qat.schedule.freeze_observers_at) == (
            freeze_bn_at,
            freeze_observers_at,
        )
        assert type(qat.schedule.freeze_bn_at) is type(freeze_bn_at)
        assert qat.int8_path == folder / "int8/int8.pt"
        assert qat._prepared[0].recipe.layers == ("block.0",)
        assert "untraceable='float'" in str(qat.settings)
        check(Run(cli.trainer, cli.model, qat))


@row(
    "pytorch_lightning",
    "pytorch_lightning.Trainer(callbacks=[qat]).fit(module)",
    "refused, also with a module or Trainer of lightning.pytorch: the two packages do not mix",
)
def pytorch_lightning_package(folder: Path) -> None:
    older: Any = pytest.importorskip("pytorch_lightning")

    class Older(older.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = Residual()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def make() -> Any:
        return older.Trainer(
            accelerator="cpu", callbacks=[callback()], logger=False, default_root_dir=folder, max_epochs=1
        )

    with pytest.raises(
        MisconfigurationException, match=r"`pytorch_lightning` has classes of its own.*Replace"
    ):
        make().fit(Older(), loader())
    for runner, module in ((make(), TinyModule()), (trainer(folder, callback()), Older())):
        with pytest.raises(TypeError, match="must be a `LightningModule`"):  # Lightning's own words
            runner.fit(module, loader())
    assert isinstance(trainer(folder), pl.Trainer)
