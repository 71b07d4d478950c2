"""The LightningModules that the callback meets: several inputs, built late, layers in odd places."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import QuantizationAwareTraining, prepare
from qat_lightning.quantize.recipe import quantized_networks, recipe_of
from tests.networks import Residual, Stubbed, TwoInputs, images, sqnr
from tests.runs import TinyModule, dataset, trainer


def fit(
    folder: Path, module: pl.LightningModule, epochs: int = 1, **options: Any
) -> QuantizationAwareTraining:
    qat = QuantizationAwareTraining(backend="onednn", **options)
    trainer(folder, qat, max_epochs=epochs, enable_checkpointing=False).fit(module)
    return qat


def networks(module: nn.Module | None) -> list[tuple[str, str, bool]]:
    assert module is not None
    return [(name, recipe.mode, recipe.int8) for name, _, recipe in quantized_networks(module)]


class KeywordInputs(TinyModule):
    def __init__(self) -> None:
        super().__init__(TwoInputs())

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:  # type: ignore[override]
        return self.model(x, extra=extra)["logits"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0], extra=batch[1]), batch[2])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = dataset().tensors
        return DataLoader(TensorDataset(x, torch.randn(len(x), 5), y), batch_size=8)

    val_dataloader = train_dataloader


def test_several_inputs_and_keyword_inputs(tmp_path: Path) -> None:
    module = KeywordInputs()
    qat = fit(tmp_path, module, epochs=4)
    assert networks(qat.int8_module) == [("model", "fx", True)]
    x, extra = images(), torch.randn(16, 5)
    with torch.no_grad():
        fake, int8 = module.eval()(x, extra=extra), qat.int8_module(x, extra=extra)  # type: ignore[misc]
    assert sqnr(fake, int8) > 20


class Hyper(TinyModule):
    def __init__(self, width: int = 8, lr: float = 0.05) -> None:
        super().__init__(Residual(width), lr)
        self.save_hyperparameters()


def test_save_hyperparameters(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining()
    trainer(tmp_path, qat, max_epochs=1).fit(Hyper(width=16))
    assert qat.int8_module is not None
    assert dict(qat.int8_module.hparams) == {"width": 16, "lr": 0.05}
    (path,) = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"width": 16, "lr": 0.05}


class Configured(TinyModule):
    """Built in `configure_model`, guarded as Lightning asks."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.model = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.model is None:
            self.model = Residual()


class Unguarded(Configured):
    def configure_model(self) -> None:
        self.model = Residual()


class BuiltInSetup(Configured):
    def configure_model(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        self.model = Residual()


class PartlyBuiltInSetup(TinyModule):
    def setup(self, stage: str) -> None:
        self.teacher = Residual()


def test_a_network_built_in_configure_model(tmp_path: Path) -> None:
    qat = fit(tmp_path, Configured())
    assert networks(qat.int8_module) == [("model", "fx", True)]


def test_an_unguarded_configure_model_gets_the_guard_to_add(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, Unguarded())
    assert "The network 'model' was prepared for quantization and then replaced" in str(caught.value)
    assert "def configure_model(self):\n        if self.model is not None:\n            return" in str(
        caught.value
    )


def test_a_network_built_in_setup_gets_the_place_to_move_it_to(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"BuiltInSetup holds no network.*`setup` builds.*`configure_model`:\n"
    ):
        fit(tmp_path, BuiltInSetup())


def test_a_second_network_built_in_setup_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="'teacher' appeared after the callback's setup"):
        fit(tmp_path, PartlyBuiltInSetup())


class LooseEager(TinyModule):
    """The layers are on the LightningModule itself, with QuantStubs."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        del self.model
        for name, child in Stubbed().named_children():
            self.add_module(name, child)

    forward = Stubbed.forward  # type: ignore[assignment]
    fuse_model = Stubbed.fuse_model


def test_layers_on_the_module_are_prepared_in_place_in_eager_mode(tmp_path: Path) -> None:
    module = LooseEager()
    qat = fit(tmp_path, module, epochs=4)
    assert networks(module) == [("", "eager", False)]
    recipe = recipe_of(module)
    assert recipe is not None
    assert recipe.layers == ("conv1", "conv2", "fc")
    assert networks(qat.int8_module) == [("", "eager", True)]
    x = dataset(32, seed=2).tensors[0]
    with torch.no_grad():
        assert sqnr(module.eval()(x), qat.int8_module(x)) > 25  # type: ignore[misc]
    (fake,) = trainer(tmp_path).test(module, verbose=False)
    (int8,) = trainer(tmp_path).test(qat.int8_module, verbose=False)
    assert int8["test_accuracy"] == pytest.approx(fake["test_accuracy"], abs=0.04)


class Pair(TinyModule):
    """A teacher in eager mode beside a student in fx mode."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Stubbed()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.teacher(x)


def test_two_networks_in_one_module(tmp_path: Path) -> None:
    module = Pair()
    qat = fit(tmp_path, module, keep_float=["block", "fc"])
    assert networks(qat.int8_module) == [("model", "fx", True), ("teacher", "eager", True)]
    kept = [recipe.keep_float for _, _, recipe in quantized_networks(module)]
    assert kept == [("block", "fc"), ("fc",)]


def test_modules_narrows_the_choice(tmp_path: Path) -> None:
    module = Pair()
    qat = fit(tmp_path, module, modules=["model.block"])
    assert networks(qat.int8_module) == [("model.block", "fx", True)]
    assert type(module.teacher) is Stubbed
    assert type(module.model) is Residual


def test_a_network_prepared_beforehand_is_kept(tmp_path: Path) -> None:
    module = TinyModule(prepare(Residual(), keep_float=["fc"], backend="onednn"))
    network = module.model
    qat = fit(tmp_path, module)
    assert module.model is network
    assert networks(qat.int8_module) == [("model", "fx", True)]


# LightningCLI's own use of jsonargparse.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_lightning_cli_builds_the_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    callback = {
        "class_path": "qat_lightning.QuantizationAwareTraining",
        "init_args": {
            "backend": "qnnpack",
            "keep_float": ["fc"],
            "freeze_bn_at": 0.5,
            "freeze_observers_at": 1,
            "output_dir": str(tmp_path),
        },
    }
    options = {"callbacks": [callback], "fast_dev_run": True, "accelerator": "cpu", "logger": False}
    cli = LightningCLI(
        Hyper, args={"trainer": options}, run=False, save_config_callback=None, seed_everything_default=False
    )
    (qat,) = [c for c in vars(cli.trainer)["callbacks"] if isinstance(c, QuantizationAwareTraining)]
    assert (qat.settings.backend, qat.settings.keep_float) == ("qnnpack", ["fc"])
    assert (qat.schedule.freeze_bn_at, qat.schedule.freeze_observers_at) == (0.5, 1)
    assert isinstance(qat.schedule.freeze_observers_at, int)
    assert qat.output_dir == tmp_path


def test_hydra_builds_the_callback(tmp_path: Path) -> None:
    config = {
        "_target_": "qat_lightning.QuantizationAwareTraining",
        "keep_float": ["fc"],
        "modules": ["model"],
        "freeze_bn_at": 0.5,
        "output_dir": str(tmp_path),
    }
    qat = hydra.utils.instantiate(config)
    assert isinstance(qat, QuantizationAwareTraining)
    module = TinyModule()
    trainer(tmp_path, qat, fast_dev_run=True).fit(module)
    recipe = recipe_of(module.model)
    assert recipe is not None
    assert recipe.keep_float == ("fc",)
