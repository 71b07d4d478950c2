"""Preflight: each classic mistake is found before the first epoch, with the line that makes it."""

from __future__ import annotations

import inspect
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F
from torchvision import models

from qat_lightning import PreflightError, QuantizationAwareTraining, convert, preflight, prepare
from qat_lightning.analysis.preflight.dry_run import dry_run
from qat_lightning.analysis.preflight.inventory import count_work
from qat_lightning.base.inputs import Inputs
from tests.networks import CASES, Case, ConvBnRelu, Residual
from tests.runs import TinyModule, trainer

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Stubs(nn.Module):
    """What the mistakes below have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.functional = FloatFunctional()


class PlainPlus(Stubs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        x = self.conv(x) + x  # the line
        return self.dequant(self.last(x))


class PlainTimes(Stubs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        x = self.conv(x) * x  # the line
        return self.dequant(self.last(x))


class PlainCat(Stubs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        x = torch.cat([self.conv(x), self.last(x)])  # the line
        return self.dequant(x)


class LateStub(Stubs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # the line
        x = self.quant(x)
        return self.dequant(self.last(x))


class EarlyDeQuantStub(Stubs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.dequant(self.conv(self.quant(x)))
        return self.last(x)  # the line


class Unsupported(Stubs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.quant(x))
        x = F.softplus(x)  # the line
        return self.dequant(self.last(x))


class UnsupportedLayer(Stubs):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.quant(x))
        x = self.activation(x)  # the line
        return self.dequant(self.last(x))


class MixedTypes(Stubs):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.quant(x))
        y = self.functional.add(y, x)  # the line
        return self.dequant(self.last(y))


class WrongEngine(Stubs):
    def forward(self, x: Tensor) -> Tensor:
        torch.backends.quantized.engine = "onnx"  # the line
        return self.dequant(self.conv(self.quant(x)))


class OtherDevice(Stubs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        if x.is_quantized:
            x = x.to("meta")  # the line
        return self.dequant(self.conv(x))


class StaysInTraining(Stubs):
    def train(self, mode: bool = True) -> StaysInTraining:  # the line
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.conv(self.quant(x)))


MISTAKES: list[tuple[type[Stubs], str, str]] = [
    (PlainPlus, "add", "FloatFunctional"),
    (PlainTimes, "mul", "FloatFunctional"),
    (PlainCat, "cat", "FloatFunctional"),
    (LateStub, "quantized::conv2d.new", "QuantStub"),
    (EarlyDeQuantStub, "quantized::conv2d.new", "QuantStub"),
    (Unsupported, "aten::softplus.out", "self.dequant"),
    (UnsupportedLayer, "aten::softplus.out", "keep_float=['activation']"),
    (MixedTypes, "add", "quantize both"),
    (OtherDevice, "", "x.cpu()"),
    (WrongEngine, "engine", "do not set torch.backends.quantized.engine"),
    (StaysInTraining, "", "super().train(mode)"),
]


def marked_line(kind: type[nn.Module]) -> str:
    """Where the comment stands in the source of a class, as `file:line`."""
    lines, first = inspect.getsourcelines(kind)
    (offset,) = (i for i, line in enumerate(lines) if "# the line" in line)
    return f"{inspect.getsourcefile(kind)}:{first + offset}:"


@pytest.mark.parametrize(("kind", "op", "fix"), MISTAKES, ids=lambda v: getattr(v, "__name__", None))
def test_a_mistake_is_named_with_its_line_and_its_fix(kind: type[Stubs], op: str, fix: str) -> None:
    with pytest.raises(PreflightError) as caught:
        preflight(kind(), X)
    error = caught.value
    assert error.line is not None
    assert error.line.startswith(marked_line(kind))
    assert marked_line(kind) in str(error)
    assert fix in str(error)
    assert not op or error.op == op


class KeptReLU6(Stubs):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.clamp = nn.BatchNorm2d(3), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.quant(x)))
        x = self.clamp(x)  # the line
        return self.dequant(self.last(x))


def test_a_relu6_that_cannot_be_fused_is_named_with_its_line() -> None:
    with pytest.raises(PreflightError, match="ReLU6") as caught:
        preflight(KeptReLU6(), X, fuse=[["conv", "norm", "clamp"]], replace_relu6=False)
    assert caught.value.path == "clamp"
    assert caught.value.line is not None
    assert caught.value.line.startswith(marked_line(KeptReLU6))
    preflight(KeptReLU6(), X, fuse=[["conv", "norm", "clamp"]])


def test_a_name_that_matches_nothing_stays_a_value_error() -> None:
    with pytest.raises(ValueError, match="keep_float has 'lastt', which matches nothing"):
        preflight(KeptReLU6(), X, keep_float=["lastt"])


def test_a_missing_stub_names_the_forward() -> None:
    class NoDeQuantStub(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.conv = QuantStub(), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:  # the line
            return self.conv(self.quant(x))

    with pytest.raises(ValueError, match="has no DeQuantStub") as caught:
        preflight(NoDeQuantStub(), X)
    assert marked_line(NoDeQuantStub) in str(caught.value)


class Sigmoids(nn.Module):
    """A batch-norm without a layer before it, and a float operation between int8 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv(x), 2)
        x = self.norm(x)
        x = self.last(torch.cumsum(x, 1))
        return self.up(x)


def test_a_report_says_what_is_not_plain_int8_and_where() -> None:
    (report,) = preflight(Sigmoids(), X, keep_float=["up"])
    source, first = inspect.getsourcelines(Sigmoids)

    def line(code: str) -> str:
        (offset,) = (i for i, text in enumerate(source) if code in text)
        return f"{__file__}:{first + offset}:"

    (sums,), (up,) = report.float_ops, report.float_layers
    assert not report.batch_norms  # the one there is a table of bytes for each channel
    assert sums.kind == "cumsum"
    assert sums.line.startswith(line("torch.cumsum"))
    assert up.name == "up"
    assert up.why == "keep_float"
    assert up.line.startswith(line("self.up(x)"))
    assert report.layers == 2
    conv, last, transposed = 12 * 12 * 4 * 3, 6 * 6 * 4 * 4, 6 * 6 * 4 * 2 * 4  # multiply-adds of a sample
    assert report.int8_share == pytest.approx((conv + last) / (conv + last + transposed))


def test_the_share_and_the_fused_layers_of_resnet18() -> None:
    (report,) = preflight(models.resnet18(), torch.randn(2, 3, 64, 64), backend="onednn")
    assert report.int8_share == 1
    assert report.layers == 21
    assert report.fused == {"Conv2d+BatchNorm2d": 11, "Conv2d+BatchNorm2d+ReLU": 9}
    assert report.float_layers == report.batch_norms == report.float_ops == ()


class Attending(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fc, self.fused = nn.Linear(8, 8), fused

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)[:, None]  # a head of its own
        if self.fused:
            return F.scaled_dot_product_attention(x, x, x)
        return (x @ x.transpose(-2, -1) / 8**0.5).softmax(-1) @ x


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_as_float_work(fused: bool) -> None:
    (report,) = preflight(Attending(fused=fused), torch.randn(2, 6, 8))
    layer, products = 6 * 8 * 8, 2 * 6 * 6 * 8
    assert report.int8_share == pytest.approx(layer / (layer + products))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_passes(case: Case) -> None:
    (report,) = preflight(case.build(), Inputs(*case.inputs()), mode=case.mode)
    assert report.layers > 0
    assert 0 < report.int8_share <= 1


def _state(module: nn.Module) -> list[Any]:
    flags = [m.training for m in module.modules()]
    return [flags, *(value.clone() for value in module.state_dict().values() if isinstance(value, Tensor))]


def _same(left: list[Any], right: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(left, right, strict=True)
    )


def _draws() -> list[Any]:
    return [random.random(), float(np.random.rand()), torch.rand(3)]


def test_synchronized_batch_norm_is_tried_alone() -> None:
    prepared = nn.SyncBatchNorm.convert_sync_batchnorm(prepare(ConvBnRelu()))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in prepared.modules())
    assert dry_run("model", prepared, Inputs((X,), {})).layers == 1


def test_nothing_is_disturbed() -> None:
    network = models.mobilenet_v3_small()
    network.features[3].eval()
    before = _state(network)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = _draws()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    preflight(network, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert _same(_draws(), expected)
    assert _same(_state(network), before)


def test_a_run_with_and_without_preflight_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    states = []
    for on in (True, False):
        torch.manual_seed(0)
        module = TinyModule(Residual())
        qat = QuantizationAwareTraining(preflight=on)
        trainer(tmp_path / str(on), qat, max_epochs=2).fit(module)
        assert len(qat.preflight_reports) == on
        states.append(_state(module))
    assert _same(*states)


def test_the_callback_stops_a_run_at_its_first_batch(tmp_path: Path) -> None:
    module = TinyModule(PlainPlusClassifier())
    run = trainer(tmp_path, QuantizationAwareTraining(), max_epochs=2)
    with pytest.raises(PreflightError, match="FloatFunctional") as caught:
        run.fit(module)
    assert run.global_step == 1
    assert caught.value.network == "model"
    assert not any(m._forward_pre_hooks for m in module.modules())


class PlainPlusClassifier(PlainPlus):
    """With one output for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


@pytest.mark.slow
def test_every_process_gets_the_verdict(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ddp_script", str(tmp_path), "mistake"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, env=environment, timeout=300)
    errors = [(tmp_path / f"error{rank}.txt").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert "return self.dequant(x + x)" in errors[0]
    assert "FloatFunctional" in errors[0]


def test_the_callback_says_in_one_line_what_it_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, QuantizationAwareTraining(), max_epochs=1).fit(TinyModule(Residual()))
    (line,) = (r.getMessage() for r in caplog.records if "Preflight" in r.getMessage())
    assert line == "Preflight: model: 3 of 3 layers int8, 100.0% of the multiply-adds"


def test_int8_networks_name_the_device_they_do_not_run_on() -> None:
    prepared = prepare(ConvBnRelu()).train()
    prepared(X)
    with pytest.raises(RuntimeError, match=r"run on the CPU, but .* received a tensor on meta"):
        convert(prepared)(X.to("meta"))


@pytest.mark.parametrize("inputs", [X, (X,), {"x": X}], ids=["tensor", "tuple", "mapping"])
def test_inputs_may_be_given_in_three_ways(inputs: Any) -> None:
    (report,) = preflight(Residual(), inputs)
    assert report.layers == 3


def test_networks_of_a_lightning_module_are_tried_with_what_its_forward_gives_them() -> None:
    (report,) = preflight(TinyModule(Residual()), X)
    assert report.name == "model"
    build: Callable[[], nn.Module] = Residual
    module = TinyModule(build())
    module.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="calls none of its networks"):
        preflight(module, X)


def test_work_is_counted_with_the_tensors_of_a_validation() -> None:
    with torch.inference_mode():
        words = torch.tensor([[1, 2, 3]])
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    assert count_work(network, Inputs((words,), {})).total == 3 * 4 * 2
