"""Batch-norms, convolutions and linear layers of one's own class, which torch.ao would not fuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import convert, export_onnx, prepare
from qat_lightning.export.load import load_graph
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.layers.integer_arithmetic import IntegerArithmetic
from tests.networks import CLASSES, images, same_state, sqnr, train_steps


class Same(nn.Conv2d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation)


class Standardized(nn.Conv2d):
    """Computes its weight anew."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Head(nn.Linear):
    """Says the same as its parent, in its own words."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Halved(nn.BatchNorm2d):
    """Does something before and after, counts its batches, and checks its input."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"4 dimensions, not {x.ndim}")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x / 2, *statistics, self.weight, self.bias, self.training, 0.1) / 2


class Frozen(nn.BatchNorm2d):
    """Normalizes with its statistics in training, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)


class Shifted(nn.BatchNorm2d):
    """Its factor is not its weight."""

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight + 1, self.bias, self.training)


class Own(nn.Module):
    def __init__(self, kind: type[nn.Conv2d] = Same, norm: type[nn.Module] = BatchNormAct2d) -> None:
        super().__init__()
        self.conv, self.norm = kind(3, 8, 3, stride=2, bias=False), norm(8)
        self.head = Head(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def functions(prepared: Any) -> set[Any]:
    return {node.target for node in prepared.graph.nodes if node.op == "call_function"}


def alone(prepared: Any) -> list[str]:
    """Batch-norms that the graph calls by themselves."""
    called = {str(node.target) for node in prepared.graph.nodes if node.op == "call_module"}
    return [name for name in called if isinstance(prepared.get_submodule(name), nn.BatchNorm2d)]


def moved(network: nn.Module) -> nn.Module:
    """With other statistics and weights than fresh ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    return network


@pytest.mark.parametrize("norm", [BatchNormAct2d, Halved, Frozen, Shifted])
@pytest.mark.parametrize("kind", [Same, Standardized])
def test_without_rounding_it_is_the_float_network(kind: Any, norm: Any) -> None:
    network, x = moved(Own(kind, norm)), images()
    plain = copy.deepcopy(network)
    prepared = prepare(network)
    set_enabled(prepared, observer=False, fake_quant=False)
    for training in (True, False, True):
        torch.testing.assert_close(
            prepared.train(training)(x), plain.train(training)(x), rtol=1e-4, atol=1e-5
        )
    theirs = {name: value for name, value in plain.state_dict().items() if name.startswith("norm.running")}
    ours = {
        f"norm.{name.rpartition('.')[2]}": value
        for name, value in prepared.state_dict().items()
        if "running" in name
    }
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [BatchNormAct2d, Halved])
def test_the_network_that_was_prepared_is_as_it_was(norm: Any) -> None:
    network = Own(norm=norm)
    before, kinds = copy.deepcopy(network.state_dict()), [type(m) for m in network.modules()]
    prepare(network)
    assert not same_state(network.state_dict(), before)
    assert [type(m) for m in network.modules()] == kinds
    function = F.batch_norm
    assert function.__module__ == "torch.nn.functional"


def test_a_convolution_a_norm_and_its_activation_are_one_layer() -> None:
    prepared: Any = prepare(Own())
    assert type(prepared.get_submodule("conv")).__name__ == "ConvBn2d"
    assert prepared.get_submodule("conv").relu
    assert isinstance(prepared.get_submodule("head"), IntegerArithmetic)
    assert not functions(prepared) & {F.conv2d, F.linear, F.batch_norm, torch._assert}
    assert not alone(prepared)


@pytest.mark.parametrize("norm", [Frozen, Shifted])
def test_one_that_normalizes_in_another_way_stays_whole(norm: Any) -> None:
    prepared = prepare(Own(norm=norm))
    assert type(prepared.get_submodule("norm")) is norm


def test_a_weight_that_is_computed_stays_a_function() -> None:
    prepared = prepare(Own(Standardized))
    assert F.conv2d in functions(prepared)


@pytest.mark.parametrize("keep", ["conv", "norm", Same, BatchNormAct2d])
def test_each_can_be_kept_float(keep: Any) -> None:
    prepared = prepare(Own(), keep_float=[keep])
    kept = prepared.get_submodule("conv")
    assert not isinstance(kept, IntegerArithmetic) or keep in ("norm", BatchNormAct2d)
    assert isinstance(prepared.get_submodule("head"), IntegerArithmetic)


def test_int8_follows(tmp_path: Path) -> None:
    prepared, x = prepare(Own()), images()
    train_steps(prepared, ((x,), {}))
    with torch.no_grad():
        assert sqnr(prepared(x), convert(prepared)(x)) > 30
    path = export_onnx(prepared, tmp_path / "int8.onnx", (x,), min_sqnr=30)
    assert not load_graph(path).float_operations()


def test_one_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = Same(3, 3, 2), BatchNormAct2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.norm(self.conv(x))))

    prepared, x = prepare(Twice()), images()
    train_steps(prepared, ((x,), {}))
    with torch.no_grad():
        assert sqnr(prepared(x), convert(prepared)(x)) > 20


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_050",
        "tf_mobilenetv3_small_minimal_100",
        "regnetx_002",
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
def test_all_batch_norms_of_a_network_of_timm_are_fused(name: str) -> None:
    prepared = prepare(timm.create_model(name, num_classes=CLASSES))
    assert not alone(prepared)
    assert F.batch_norm not in functions(prepared)
    assert F.linear not in functions(prepared)


def test_what_a_network_leaves_out_keeps_nothing_from_being_fused() -> None:
    """timm's ResNets have an Identity between batch-norm and activation, in the place of a DropBlock."""
    prepared: Any = prepare(timm.create_model("resnet18", num_classes=CLASSES))
    with_relu = [m.relu for m in prepared.modules() if type(m).__name__ == "ConvBn2d"]
    assert with_relu.count(True) == 9  # the first, and the first of each of eight blocks
    assert with_relu.count(False) == 11
    assert nn.ReLU not in {
        type(prepared.get_submodule(str(n.target))) for n in prepared.graph.nodes if n.op == "call_module"
    }


def test_a_weight_that_a_function_gets_is_stored_as_int8(tmp_path: Path) -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(CLASSES, 3 * 12 * 12) / 20)
            self.last = nn.Linear(CLASSES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(x.flatten(1), self.matrix))

    prepared, x = prepare(Called()), images()
    train_steps(prepared, ((x,), {}))
    path = export_onnx(prepared, tmp_path / "int8.onnx", (x,), min_sqnr=40)
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    assert {str(array.dtype) for array in arrays if array.size == CLASSES * 3 * 12 * 12} == {"int8"}
    assert not load_graph(path).float_operations()
