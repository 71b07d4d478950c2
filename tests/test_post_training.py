"""The baseline: int8 by calibration alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models

from qat_lightning import ConversionError, PostTrainingQuantization
from qat_lightning.base.sqnr import sqnr
from tests.networks import CLASSES, Residual, Stubbed, TwoInputs
from tests.runs import TinyModule, dataset, loader, trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TinyModule:
    torch.manual_seed(0)
    module = TinyModule()
    run = trainer(tmp_path_factory.mktemp("float"), max_epochs=10, enable_checkpointing=False)
    run.fit(module)
    return module.eval()


def calibrated(folder: Path, module: TinyModule, **options: Any) -> PostTrainingQuantization:
    ptq = PostTrainingQuantization(**options)
    trainer(folder, ptq).validate(module, loader(48), verbose=False)
    return ptq


def batches(data: list[Any]) -> DataLoader[Any]:
    """A loader of batches that are made."""
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def int8_of(ptq: PostTrainingQuantization) -> Any:
    assert ptq.int8_module is not None
    return ptq.int8_module


@pytest.mark.parametrize("backend", ["x86", "onednn", "qnnpack", "fbgemm"])
def test_int8_is_near_float_without_training(trained: TinyModule, tmp_path: Path, backend: str) -> None:
    ptq = calibrated(tmp_path, trained, backend=backend)
    x = dataset(32, seed=3).tensors[0]
    with torch.no_grad():
        assert sqnr(trained(x), int8_of(ptq)(x)) > 20
    (scores,) = trainer(tmp_path).test(ptq.int8_module, verbose=False)
    (expected,) = trainer(tmp_path).test(trained, verbose=False)
    assert scores["test_accuracy"] >= expected["test_accuracy"] - 0.05


def test_the_module_and_its_metrics_are_those_of_float(trained: TinyModule, tmp_path: Path) -> None:
    before = copy.deepcopy(trained.state_dict())
    results = []
    for callbacks in ([], [PostTrainingQuantization()]):
        torch.manual_seed(0)
        (scores,) = trainer(tmp_path, *callbacks).validate(trained, loader(48), verbose=False)
        results.append((scores, torch.rand(1).item()))
    assert results[0] == results[1]
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert not trained.model._forward_pre_hooks


def test_a_copy_that_moves_to_another_device_can_be_calibrated(
    trained: TinyModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There Lightning's inference mode would make new tensors that no observer could change."""
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self._apply(torch.clone))
    ptq = calibrated(tmp_path, trained, backend="onednn")
    x = dataset(32, seed=3).tensors[0]
    with torch.no_grad():
        assert sqnr(trained(x), int8_of(ptq)(x)) > 20


def test_ranges_are_of_what_it_was_validated_with(trained: TinyModule, tmp_path: Path) -> None:
    """A module that is calibrated on brighter images has a coarser grid for the usual ones."""
    x = dataset(32, seed=3).tensors[0]
    usual = calibrated(tmp_path, trained, backend="onednn")
    bright = PostTrainingQuantization(backend="onednn")
    data = [(20 * images, labels) for images, labels in loader(48)]
    trainer(tmp_path, bright).validate(trained, batches(data), verbose=False)
    with torch.no_grad():
        y = trained(x)
        assert sqnr(y, int8_of(usual)(x)) > sqnr(y, int8_of(bright)(x)) + 10


@pytest.mark.parametrize("network", [Stubbed, lambda: models.resnet18(num_classes=CLASSES)])
def test_eager_networks_and_torchvisions(network: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TinyModule(network())
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = 1.0
    data = [(torch.randn(8, 3, 32, 32), torch.arange(8) % CLASSES) for _ in range(2)]
    if isinstance(module.model, Stubbed):
        data = list(loader(16))
    module.train()(data[0][0])  # statistics that are those of the data
    ptq = PostTrainingQuantization(backend="onednn")
    trainer(tmp_path, ptq).validate(module, batches(data), verbose=False)
    module.eval()
    with torch.no_grad():
        assert sqnr(module(data[0][0]), int8_of(ptq)(data[0][0])) > 10


class Summed(TinyModule):
    """Calls its network with two inputs, one by name."""

    def __init__(self) -> None:
        super().__init__(TwoInputs())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("sum", self.model(batch[0], extra=batch[0].flatten(1)[:, :5])["logits"].sum())


def test_a_network_with_two_inputs(tmp_path: Path) -> None:
    module = Summed()
    ptq = PostTrainingQuantization(backend="onednn")
    trainer(tmp_path, ptq).validate(module, loader(16), verbose=False)
    x = dataset(8).tensors[0]
    extra = x.flatten(1)[:, :5]
    with torch.no_grad():
        expected, found = (each.model(x, extra=extra) for each in (module.eval(), int8_of(ptq)))
    assert sqnr(expected["logits"], found["logits"]) > 15


def test_it_is_no_callback_of_fit(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"calibrates in trainer\.validate"):
        trainer(tmp_path, PostTrainingQuantization(), max_epochs=1).fit(TinyModule())


def test_a_network_that_no_batch_reaches_is_an_error(tmp_path: Path) -> None:
    module = TinyModule()
    module.extra = Residual()
    with pytest.raises(ConversionError):
        trainer(tmp_path, PostTrainingQuantization()).validate(module, loader(16), verbose=False)


def test_an_error_in_the_users_step_leaves_no_hook(tmp_path: Path) -> None:
    class Failing(TinyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise KeyError("mine")

    module = Failing()
    with pytest.raises(KeyError, match="mine"):
        trainer(tmp_path, PostTrainingQuantization()).validate(module, loader(16), verbose=False)
    assert not module.model._forward_pre_hooks


def test_there_has_to_be_something_to_quantize(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no convolution"):
        trainer(tmp_path, PostTrainingQuantization(modules=["model"])).validate(
            TinyModule(nn.Sequential(nn.Flatten(), nn.ReLU())), loader(16), verbose=False
        )
