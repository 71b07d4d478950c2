"""Layers that compute in eval mode with the integers that int8 kernels compute with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.nn import functional as F
from torchvision import models

from qat_lightning import convert, prepare
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.layers.integer_arithmetic import IntegerArithmetic, input_fake_quantize, round_bias
from qat_lightning.modes.lowering.reference import reference
from tests.networks import CLASSES, Stubbed, StubbedLayers, images, layers_that_differ, sqnr, train_steps


def layers(prepared: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in prepared.named_modules() if isinstance(m, IntegerArithmetic)}


def known(prepared: nn.Module) -> dict[str, bool]:
    """Which layers know the grid of what they read."""
    return {name: input_fake_quantize(layer) is not None for name, layer in layers(prepared).items()}


def trained(network: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    prepared = prepare(network, **{"backend": "x86", **options})
    train_steps(prepared, ((x,), {}))
    return prepared


def differing(one: Tensor, other: Tensor) -> float:
    """Share of the elements that are not equal, to float precision."""
    return (~torch.isclose(one, other, rtol=1e-4, atol=1e-6)).float().mean().item()


# What int8 kernels compute


@pytest.mark.parametrize("backend", ["x86", "onednn", "qnnpack"])
def test_int8_equals_fake_quant(backend: str) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(128, CLASSES)),
    )
    x = images(64)
    prepared = trained(network, x, backend=backend)
    with torch.no_grad():
        assert differing(prepared(x), convert(prepared)(x)) < 0.01


@pytest.mark.parametrize("backend", ["x86", "onednn"])
def test_a_deep_network_equals_its_int8_form_layer_by_layer(backend: str) -> None:
    """Through twenty layers, of a network that torchvision wrote."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 64, 64)
    prepared = trained(models.resnet18(num_classes=10), x, backend=backend)
    assert layers_that_differ(prepared, convert(prepared), x) == []


@example(7039, "conv", True)  # a bias of 2488.5 steps in float32, and of 2488.5001 in float64
@given(st.integers(0, 10_000), st.sampled_from(["conv", "grouped", "strided", "linear"]), st.booleans())
def test_one_layer_gives_the_sums_of_its_integers(seed: int, kind: str, bias: bool) -> None:
    torch.manual_seed(seed)
    layer: nn.Module = {
        "conv": lambda: nn.Conv2d(4, 8, 3, padding=1, bias=bias),
        "grouped": lambda: nn.Conv2d(4, 8, 3, groups=4, bias=bias),
        "strided": lambda: nn.Conv2d(4, 8, 3, stride=2, dilation=2, padding=2, bias=bias),
        "linear": lambda: nn.Linear(6, 8, bias=bias),
    }[kind]()
    x = torch.randn(4, 6) if kind == "linear" else torch.randn(4, 4, 6, 6)
    prepared: Any = prepare(nn.Sequential(layer), backend="qnnpack").train()
    prepared(x)
    prepared.eval()
    (own,) = layers(prepared).values()
    grid, weight = input_fake_quantize(own), own.weight_fake_quant
    assert grid is not None
    q = (
        torch.quantize_per_tensor(x, float(grid.scale), int(grid.zero_point), torch.quint8)
        .int_repr()
        .double()
    )
    w = (weight(own.weight) / weight.scale.view(-1, *[1] * (own.weight.ndim - 1))).round().double()
    b, step = None, (grid.scale * weight.scale).double()
    if own.bias is not None:
        b = (own.bias / (grid.scale * weight.scale)).round().double()  # in float32, which decides ties
        assert (own.bias / step - b).abs().max() <= 0.5 + 1e-3
    q -= int(grid.zero_point)
    if kind == "linear":
        exact = F.linear(q, w, b) * step
    else:
        options = own.stride, own.padding, own.dilation, own.groups
        exact = F.conv2d(q, w, b, *options) * step.view(-1, 1, 1)
    with torch.no_grad():
        found = own(grid(x))
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_a_bias_lies_on_the_grid_of_the_sums_in_every_form() -> None:
    """So that runtimes that round it there, and those that do not, compute the same."""
    prepared = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), images())
    for own, layer in zip(layers(prepared).values(), (0, 2), strict=True):
        step = input_fake_quantize(own).scale * own.weight_fake_quant.scale  # type: ignore[union-attr]
        for network in (reference(prepared), convert(prepared)):
            module: Any = network.get_submodule(str(layer))
            bias = module.layer.bias if hasattr(module, "layer") else module.bias
            assert torch.equal(bias, round_bias(bias, step))
            assert not torch.equal(bias, own.bias)  # the trained one, which stays as it was


# Which grid a layer reads


def test_a_graph_tells_each_layer_what_it_reads() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, CLASSES)),
    )
    assert known(prepare(network)) == {"0": True, "3": True, "7": True}


class Reused(nn.Module):
    """One layer reads two tensors, each on a grid of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + self.conv2(x)


def test_a_layer_that_reads_two_grids_knows_none() -> None:
    prepared = trained(Reused(), x := images())
    assert known(prepared) == {"conv1": True, "conv2": False}
    assert sqnr(prepared(x), convert(prepared)(x)) > 25


def test_eager_networks_are_traced() -> None:
    prepared = trained(Stubbed(), x := images())
    assert known(prepared) == {"conv1": True, "conv2": True, "fc": True}
    with torch.no_grad():
        assert differing(prepared(x), convert(prepared)(x)) < 0.02


class Averaged(nn.Module):
    """Something between two layers that is on no grid, and code that no trace can follow."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.layers = StubbedLayers(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.add = FloatFunctional()
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            x = x + 1
        first, relu, second = self.layers.layers
        y = relu(first(self.layers.quant(x)))
        return self.layers.dequant(second(F.avg_pool2d(y, 2)))


@pytest.mark.parametrize("traceable", [True, False])
def test_what_is_not_known_is_computed_as_before(traceable: bool) -> None:
    prepared = prepare(Averaged(traceable), mode="eager", fuse=[["layers.layers.0", "layers.layers.1"]])
    train_steps(prepared, ((x := images(),), {}))
    assert known(prepared) == {"layers.layers.0": traceable, "layers.layers.2": False}
    assert torch.isfinite(prepared(x)).all()


def test_a_copy_reads_its_own_grid() -> None:
    prepared = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), images())
    copied = copy.deepcopy(prepared)
    (own,), (theirs,) = layers(copied).values(), layers(prepared).values()
    assert input_fake_quantize(own) is not input_fake_quantize(theirs)
    assert input_fake_quantize(own) in set(copied.modules())
    assert copied.state_dict().keys() == prepared.state_dict().keys()


# When floats are computed with


def test_training_and_gradients_are_as_they_were() -> None:
    """In training nothing changes; in eval mode gradients are those of the rounded floats."""
    prepared = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), x := images())
    plain = copy.deepcopy(prepared)
    for layer in layers(plain).values():
        vars(layer).pop("input_fake_quantize")
    for training in (True, False):
        found = []
        for network in (prepared, plain):
            inputs = x.clone().requires_grad_()
            network.train(training).zero_grad()
            network(inputs).square().sum().backward()
            assert inputs.grad is not None
            found.append([inputs.grad, *(p.grad for p in network.parameters())])
        for one, other in zip(*found, strict=True):
            assert sqnr(other, one) > (180 if training else 30)


@pytest.mark.parametrize("off", ["weight", "activation"])
def test_without_rounding_there_are_no_integers(off: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    plain = copy.deepcopy(network)
    prepared = prepare(network).train()
    x = images()
    prepared(x)
    for layer in layers(prepared).values():
        set_enabled(
            layer.weight_fake_quant if off == "weight" else prepared, observer=False, fake_quant=False
        )
    difference = sqnr(plain(x), prepared.eval()(x))
    assert difference > (100 if off == "activation" else 25)


def test_autocast_computes_with_floats() -> None:
    """Sums of integers do not fit into float16."""
    prepared = trained(nn.Sequential(nn.Linear(512, 8)), x := torch.rand(4, 512))
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        y = prepared(x)
    assert torch.isfinite(y).all()
    assert sqnr(prepared(x), y.float()) > 25


def test_a_network_in_eval_mode_compiles() -> None:
    prepared = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), x := images())
    compiled = torch.compile(copy.deepcopy(prepared), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert differing(prepared(x), compiled(x)) < 1e-3
