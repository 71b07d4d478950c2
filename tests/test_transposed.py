"""Transposed convolutions: they train as layers, and runtimes compute what was trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import (
    QuantizationAwareTraining,
    convert,
    export_onnx,
    export_openvino,
    load_int8,
    load_qat_checkpoint,
    load_runtime,
    preflight,
    prepare,
    save_int8,
    sensitivity,
)
from qat_lightning.fake_quant.phases import freeze_bn_statistics, set_enabled
from qat_lightning.modes.layers.transposed import ConvTransposeBn2d, TransposedLayer
from qat_lightning.modes.lowering.int8 import onednn
from qat_lightning.modes.lowering.int8.edges import Quantize
from qat_lightning.modes.lowering.int8.transposed import Int8Transposed
from qat_lightning.modes.lowering.lower import lower
from qat_lightning.modes.lowering.reference import reference
from qat_lightning.modes.lowering.sub_pixels import Transposed, cut, sub_pixels
from qat_lightning.quantize.recipe import attach, recipe_of
from tests.networks import UNet, same_state, sqnr, train_steps
from tests.runs import TinyModule, trainer

BACKENDS = ("onednn", "onnxruntime", "openvino")
Up = nn.ConvTranspose2d


class Sized(nn.Module):
    """Asks for the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.last = nn.Conv2d(3, 8, 3, 2, 1), Up(8, 4, 3, 2, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.up(self.down(x), output_size=x.shape[-2:])))


class Shifted(nn.Module):
    """Its transposed convolution reads bytes with a zero point."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.last = nn.Conv2d(3, 8, 1), Up(8, 4, 4, 2, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.leaky_relu(self.up(F.leaky_relu(self.first(x), 0.1)), 0.1))


class Functional(nn.Module):
    """Calls the function with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 3, 1)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 2, 3, 3) / 9), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(self.first(x), self.weight, bias=self.bias, stride=2, groups=2)
        return self.last(F.relu(y))


class Own(Up):
    """A user-defined one, which calls the function with its own weight."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        places: Any = (self.stride, self.padding)
        return F.conv_transpose2d(x * 1, self.weight, self.bias, *places)


def between(*layers: nn.Module) -> nn.Module:
    """Layers between convolutions."""
    last = nn.Conv2d(next(m.out_channels for m in layers if isinstance(m, Up)), 3, 1)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *layers, last)


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (lambda: between(Up(8, 4, 2, 2)), 4),
    "norm and relu": (lambda: between(Up(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), 4),
    "leaky": (lambda: between(Up(8, 4, 3, 2, 1, 1), nn.LeakyReLU(0.1)), 4),
    "shifted": (lambda: Shifted(), 4),
    "groups": (lambda: between(Up(8, 4, 4, 2, 1, groups=2), nn.BatchNorm2d(4), nn.ReLU()), 2),
    "depthwise": (lambda: between(Up(8, 8, 4, 2, 1, groups=8), nn.BatchNorm2d(8)), 8),
    "multiplied": (lambda: between(Up(8, 16, 3, 2, 1, 1, groups=8)), 8),
    "dilation": (lambda: between(Up(8, 4, 3, 2, 1, 1, dilation=2)), 4),
    "stride 1": (lambda: between(Up(8, 4, 3, 1, 1)), 4),
    "uneven": (lambda: between(Up(8, 4, (3, 2), (2, 1), (0, 1))), 4),
    "sized": (Sized, 4),
    "functional": (Functional, 2),
    "own": (lambda: between(Own(8, 4, 2, 2)), 4),
}
"""Networks, and how many scales the weight of the transposed convolution has."""
KEEPS_CONV_TRANSPOSE = ("dilation", "uneven", "groups", "depthwise", "multiplied", "functional")
"""Cases without a plain convolution of blocks, or with a slower one."""
FAST = {
    *(("onnxruntime", case) for case in ("norm and relu", "depthwise", "sized")),
    *(("openvino", case) for case in ("norm and relu", "shifted")),
}


def image() -> Tensor:
    return torch.randn(4, 3, 7, 6)


def trained(build: Callable[[], nn.Module], x: Tensor, **options: Any) -> Any:
    torch.manual_seed(0)
    prepared = prepare(build(), example_inputs=(x[:2],), **options)
    train_steps(prepared, ((x,), {}))
    set_enabled(prepared, observer=False, fake_quant=True)
    return prepared


def transposed(prepared: nn.Module) -> Any:
    return next(m for m in prepared.modules() if isinstance(m, TransposedLayer))


def lowered(prepared: Any) -> Any:
    graph: Any = reference(prepared)
    return lower(graph)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("exact", [False, True])
def test_int8_computes_what_was_trained(case: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if exact:
        monkeypatch.setattr(onednn, "is_exact", lambda: False)
    build, scales = CASES[case]
    x = image()
    with torch.enable_grad():
        prepared = trained(build, x, backend="onednn")
    assert transposed(prepared).weight_fake_quant.scale.numel() == scales
    expected, int8 = prepared(x), convert(prepared)
    assert torch.equal(int8(x), expected)
    assert sum(isinstance(m, Int8Transposed) for m in int8.modules()) == 1
    assert sum(isinstance(m, Quantize) for m in int8.modules()) == 1
    assert torch.equal(lowered(prepared)(x[0]), expected[0])  # without a batch dimension, or guards


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, marks=[] if (backend, case) in FAST else pytest.mark.slow)
        for backend in ("onnxruntime", "openvino")
        for case in CASES
    ],
)
def test_a_runtime_computes_what_was_trained(backend: str, case: str, tmp_path: Path) -> None:
    x = image()
    prepared = trained(CASES[case][0], x, backend=backend)
    if backend == "onnxruntime":
        path = export_onnx(prepared, tmp_path / "int8.onnx", (x,), min_sqnr=40)
        runtime: Any = load_runtime(path).runtime
        floating = runtime.float_operations()
        assert floating["ConvTranspose"] == (case in KEEPS_CONV_TRANSPOSE)
    else:
        path = export_openvino(prepared, tmp_path / "int8.xml", (x,), min_sqnr=30)
        assert ("ConvolutionBackpropData" in path.read_text()) == (case not in ("shifted", "sized"))
    with torch.no_grad():
        y = image()[:3]
        assert sqnr(prepared(y), load_runtime(path)(y)) > 30


@pytest.mark.parametrize("case", ["norm and relu", "groups", "depthwise"])
def test_without_rounding_it_is_the_float_network(case: str) -> None:
    network, x = CASES[case][0](), image()
    nn.init.uniform_(network[3].weight, -1, 1)  # type: ignore[operator, index]
    plain = copy.deepcopy(network)
    prepared = prepare(network, backend="onednn")
    assert type(transposed(prepared)) is ConvTransposeBn2d
    assert transposed(prepared).relu == (case != "depthwise")
    set_enabled(prepared, observer=True, fake_quant=False)
    for each in (prepared, plain):
        train_steps(each, ((x,), {}))
    torch.testing.assert_close(prepared(x), plain(x), rtol=1e-4, atol=1e-5)  # folded, and not
    freeze_bn_statistics(prepared.train(), frozen=True)
    torch.testing.assert_close(prepared(x), plain(x), rtol=1e-4, atol=1e-5)
    float_layer = transposed(prepared).to_float()
    y = torch.randn(2, 8, 5, 5)
    expected = plain[3](plain[2](y))  # type: ignore[operator, index]
    torch.testing.assert_close(float_layer(y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_dimension(dims: int, backend: str) -> None:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    up: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    x = torch.randn(4, 3, *[5] * dims)
    layers = conv(3, 4, 1), up(4, 4, 2, 2), norm(4), nn.ReLU(), conv(4, 2, 1)
    prepared = trained(lambda: nn.Sequential(*layers), x, backend=backend)
    recipe = recipe_of(prepared)
    assert recipe is not None
    quantized = backend != "onnxruntime" or dims == 2  # ONNX Runtime would compute the others in float
    assert ("1" in recipe.layers) == quantized
    with torch.no_grad():
        found, expected = lowered(prepared)(x), prepared(x)
    if backend == "openvino":
        assert sqnr(expected, found) > 60  # its last layer returns floats
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("case", ["norm and relu", "groups"])
def test_an_int8_file(case: str, tmp_path: Path) -> None:
    x, (build, _) = image(), CASES[case]
    int8 = convert(trained(build, x, backend="onednn"))
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), build())
    with torch.no_grad():
        assert torch.equal(loaded(x), int8(x))


def test_the_file_has_int8_weights_with_scales_along_their_axis(tmp_path: Path) -> None:
    x = image()
    prepared = trained(CASES["dilation"][0], x, backend="onnxruntime")
    graph = onnx.load(export_onnx(prepared, tmp_path / "int8.onnx", (x,))).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    (up,) = (node for node in graph.node if node.op_type == "ConvTranspose")
    (read,) = (node for node in graph.node if node.output[0] == up.input[1])
    assert read.op_type == "DequantizeLinear"
    assert [attribute.i for attribute in read.attribute if attribute.name == "axis"] == [1]
    assert str(arrays[read.input[0]].dtype) == "int8"
    assert arrays[read.input[0]].shape == (8, 4, 3, 3)
    assert arrays[read.input[1]].shape == (4,)


def test_one_that_is_called_twice(tmp_path: Path) -> None:
    up = Up(8, 8, 2, 2)
    x = image()
    prepared = trained(lambda: between(up, nn.ReLU(), up), x, backend="onnxruntime")
    file = load_runtime(export_onnx(prepared, tmp_path / "int8.onnx", (x,), min_sqnr=40))
    with torch.no_grad():
        assert sqnr(prepared(x), file(x)) > 40


def test_files_from_before_they_were_int8(tmp_path: Path) -> None:
    x, (build, _) = image(), CASES["plain"]
    prepared = trained(build, x, backend="onednn", keep_float=["2"])
    recipe = recipe_of(prepared)
    assert recipe is not None
    attach(prepared, replace(recipe, keep_float=()))
    torch.save({"state_dict": prepared.state_dict()}, tmp_path / "run.ckpt")
    int8 = convert(prepared)
    with torch.no_grad():
        assert torch.equal(load_qat_checkpoint(tmp_path / "run.ckpt", build())(x), prepared(x))
        assert torch.equal(load_int8(save_int8(int8, tmp_path / "int8.pt"), build())(x), int8(x))


@pytest.mark.parametrize("keep", ["2", nn.ConvTranspose2d])
def test_it_can_be_kept_float(keep: Any) -> None:
    prepared = prepare(CASES["plain"][0](), keep_float=[keep])
    assert type(prepared.get_submodule("2")) is Up


def test_it_can_have_a_qconfig_of_its_own() -> None:
    prepared = trained(CASES["groups"][0], image(), overrides={"2": "x86"}, backend="onednn")
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.overrides == {"2": "x86"}


def test_reports_know_it() -> None:
    x = image()
    network = CASES["plain"][0]()
    (report,) = preflight(network, x, backend="onednn")
    assert report.fused == {"Conv2d+ReLU": 1}
    found = sensitivity(CASES["plain"][0](), [x] * 2, backend="onednn", calibration_batches=1)
    (up,) = (each for each in found.layers if each.name == "2")
    assert up.kind == "ConvTranspose2d"
    assert up.macs == 7 * 6 * 8 * 4 * 4


class Segments(TinyModule):
    """Learns a class for each pixel."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), (batch[0].mean(1) > 0).long())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        module = Segments(UNet())
        qat = QuantizationAwareTraining(backend="onednn", output_dir=tmp_path / "int8")
        saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(tmp_path, qat, saves, max_epochs=2).fit(module, **options)
        return module

    whole = run()
    assert same_state(whole, run(ckpt_path=tmp_path / "epoch=0.ckpt")) == []


@pytest.mark.parametrize("even", [False, True])
def test_blocks_of_pixels_are_the_transposed_convolution(even: bool) -> None:
    torch.manual_seed(0)
    x, count = torch.randn(2, 4, 3, 4).double(), 0
    for kernel, stride, padding, added in itertools.product(
        [(1, 1), (2, 2), (3, 3), (5, 4)], [1, 2, 3], [0, 1, 2], [0, 1]
    ):
        weight = torch.randn(4, 3, *kernel).double()
        places = [stride] * 2, [padding] * 2, [added] * 2, 1
        try:
            expected = F.conv_transpose2d(x, weight, None, *places)
        except RuntimeError:  # nothing would be left, or too much be added
            continue
        blocks = sub_pixels(weight, Transposed(*places, [1, 1]), even=even)
        if blocks is None:
            assert padding // stride >= -(-min(kernel) // stride)
            continue
        (top, left), (bottom, right) = blocks.before, blocks.after
        found = cut(F.conv2d(F.pad(x, (left, right, top, bottom)), blocks.weight), blocks)
        torch.testing.assert_close(found, expected)
        assert not even or blocks.before == blocks.after
        count += 1
    assert count > 30
