"""Every wrong input gets an error that says the rule, what was received, and the fix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torchvision import models

from qat_lightning import QuantizationAwareTraining, UntraceableError, convert, prepare
from qat_lightning.base.backends import engine
from qat_lightning.base.quiet import quiet_torch_ao
from tests.networks import ConvBnRelu, Residual, Stubbed, StubbedConvBnRelu, images, train_steps
from tests.runs import TinyModule, trainer
from tests.test_prepare import OWN


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"backend": "x68"}, ValueError, r"backend must be one of .*'x86'.* received 'x68'\. Nearest: 'x86'"),
        (
            {"mode": "graph"},
            ValueError,
            r"mode must be one of \('auto', 'eager', 'fx'\), but received 'graph'",
        ),
        ({"qconfig": 3}, TypeError, r"qconfig must be .*QConfig.*received int: 3"),
        ({"modules": "model"}, TypeError, r"modules must be a list, but received 'model'\. Pass \['model'\]"),
        ({"keep_float": "fc"}, TypeError, r"keep_float must be a list, but received 'fc'\. Pass \['fc'\]"),
        ({"freeze_bn_at": -1}, ValueError, r"freeze_bn_at must not be negative, but received -1\. Use None"),
        ({"freeze_bn_at": -0.5}, ValueError, r"freeze_bn_at must not be negative, but received -0\.5"),
        ({"freeze_bn_at": math.nan}, ValueError, r"freeze_bn_at must not be negative, but received nan"),
        (
            {"freeze_observers_at": 1.5},
            ValueError,
            r"freeze_observers_at as a float .* below 1, but received 1\.5\. .*\(freeze_observers_at=1\)",
        ),
        ({"freeze_observers_at": 2.0}, ValueError, r"For an epoch pass an int \(freeze_observers_at=2\)"),
        ({"freeze_observers_at": math.inf}, ValueError, r"must be below 1, but received inf"),
        ({"freeze_bn_at": True}, TypeError, r"freeze_bn_at is an epoch.*received True of type bool"),
        ({"freeze_bn_at": "3"}, TypeError, r"freeze_bn_at is an epoch.*received '3' of type str"),
        ({"fake_quant_from": 0.5}, TypeError, r"fake_quant_from is an epoch, an int from 0, .*0\.5\. Use 0"),
        ({"fake_quant_from": None}, TypeError, r"fake_quant_from is an epoch, an int from 0, .*None"),
        ({"fake_quant_from": -2}, ValueError, r"fake_quant_from must not be negative, but received -2"),
        ({"convert": "first"}, ValueError, r"convert must be 'best', 'last' or None, but received 'first'"),
        ({"output_dir": __file__}, ValueError, r"output_dir must be a folder, but .* is a file"),
    ],
)
def test_at_construction(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        QuantizationAwareTraining(**options)


def test_an_engine_that_this_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engines:
        supported_engines = ("none", "x86")

    monkeypatch.setattr(torch.backends, "quantized", Engines)
    with pytest.raises(
        ValueError, match=r"backend='qnnpack' needs an engine .* lacks; it has \['x86'\]\. Choose"
    ):
        QuantizationAwareTraining(backend="qnnpack")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if x.mean() > 0 else -x


class NoStubs(ConvBnRelu):
    pass


class StubbedBranching(StubbedConvBnRelu):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


@pytest.mark.parametrize(
    ("build", "options", "kind", "message"),
    [
        (Residual, {"modules": ["modl"]}, ValueError, r"none called 'modl'\. Nearest: 'model'"),
        (Residual, {"keep_float": ["stm"]}, ValueError, r"'stm', which matches nothing .*Nearest: 'stem'"),
        (Residual, {"keep_float": [nn.LSTM]}, ValueError, r"'LSTM', which matches nothing in Residual"),
        (Residual, {"keep_float": [7]}, TypeError, r"names, globs or types of modules, but received 7"),
        (Residual, {"keep_float": ["*"]}, ValueError, r"Nothing is left to quantize.*Keep fewer"),
        (
            Residual,
            {"fuse": [["stem.0", "stem.1"]]},
            ValueError,
            r"In fx mode .*fuse must be 'auto'.*mode='eager'",
        ),
        (nn.Identity, {}, ValueError, r"TinyModule holds no network with convolutions or linear layers"),
        (
            Branching,
            {},
            UntraceableError,
            r"cannot trace Branching(.|\n)*test_bad_input.py:\d+: .*x\.mean\(\)",
        ),
        (NoStubs, {"mode": "eager"}, ValueError, r"NoStubs has no QuantStub and no DeQuantStub.*mode='fx'"),
        (
            StubbedBranching,
            {},
            UntraceableError,
            r"trace StubbedBranching, so .* unknown for \['bn'\](.|\n)*test_bad_input.py:\d+: .*x\.mean\(\)"
            r"(.|\n)*example_inputs=\(…,\).*example_input_array.*fuse=\[\[.*mode='fx'",
        ),
        (Stubbed, {"fuse": [["conv1", "bn"]]}, ValueError, r"fuse names the module 'bn', .*Nearest: .*'bn1'"),
        (Stubbed, {"fuse": ["conv1"]}, TypeError, r"fuse must be 'auto' or a list of groups.*\['conv1'\]"),
        (
            Stubbed,
            {"qconfig": QConfigMapping().set_module_name_regex("conv.*", OWN)},
            TypeError,
            r"In eager mode a QConfigMapping may hold .* regex .*Use mode='fx'",
        ),
    ],
)
def test_at_setup(
    tmp_path: Path, build: type[nn.Module], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    runner = trainer(tmp_path, QuantizationAwareTraining(**options), fast_dev_run=True)
    with pytest.raises(kind, match=message):
        runner.fit(TinyModule(build()))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_parameters(tmp_path: Path, strategy: type[Strategy]) -> None:
    qat = QuantizationAwareTraining()
    runner = trainer(tmp_path, fast_dev_run=True)
    runner._accelerator_connector.strategy = strategy.__new__(strategy)  # to build one needs a GPU
    message = rf"needs every parameter whole .* but {strategy.__name__} shards them\. Use strategy='ddp'"
    with pytest.raises(MisconfigurationException, match=message):
        qat.setup(runner, TinyModule(), "fit")


def test_a_strategy_that_forks(tmp_path: Path) -> None:
    runner = trainer(tmp_path, QuantizationAwareTraining(), strategy="ddp_spawn", devices=2, max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"'spawn'.*Use strategy='ddp'"):
        QuantizationAwareTraining().setup(runner, TinyModule(), "fit")


def test_a_fraction_of_an_endless_run(tmp_path: Path) -> None:
    runner = trainer(tmp_path, QuantizationAwareTraining(freeze_observers_at=0.5), max_epochs=-1)
    with pytest.raises(
        ValueError, match=r"needs a run of known length.*Set one of them, or give the freeze as"
    ):
        runner.fit(TinyModule())


def test_networks_that_are_quantized_already() -> None:
    with pytest.raises(ValueError, match="Residual is quantized already: it was prepared before"):
        prepare(prepare(Residual()))
    prepared = prepare(Residual())
    train_steps(prepared, ((images(),), {}))
    with pytest.raises(ValueError, match="is quantized already: it was prepared before"):
        prepare(convert(prepared))
    outer = nn.Sequential(prepare(Residual()), nn.ReLU())
    with pytest.raises(ValueError, match="Sequential is quantized already: it holds fake-quantize modules"):
        prepare(outer)
    outer = nn.Sequential(convert(prepared), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"is quantized already: its '0.*' is the int8 module qat_lightning"):
        prepare(outer)


def test_torchvisions_int8_models_get_the_argument_to_change(tmp_path: Path) -> None:
    with quiet_torch_ao(), engine("qnnpack"):  # torchvision switches to it and leaves it so
        network = models.quantization.mobilenet_v2(quantize=True)
    runner = trainer(tmp_path, QuantizationAwareTraining(), fast_dev_run=True)
    with pytest.raises(
        ValueError, match=r"is quantized already.*torchvision's quantizable models take quantize=F"
    ):
        runner.fit(TinyModule(network))


def test_nothing_to_quantize() -> None:
    with pytest.raises(ValueError, match="ReLU holds no convolution and no linear layer"):
        prepare(nn.ReLU())
