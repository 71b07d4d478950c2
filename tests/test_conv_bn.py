"""The fused convolution and batch-norm that does not divide."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from qat_lightning import FakeQuantize, convert, prepare
from qat_lightning.base.schedule import Phase
from qat_lightning.fake_quant.phases import enter, freeze_bn_statistics, set_enabled
from qat_lightning.modes.layers.fused_conv_bn import ConvBn2d
from qat_lightning.quantize.floating import is_int8
from tests.networks import sqnr, train_steps


def pair(relu: bool = False, **options: Any) -> nn.Sequential:
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.weight, -1, 1)  # some scales negative
    nn.init.normal_(norm.bias)
    layers = [nn.Conv2d(3, 8, 3, **options), norm]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def fused(prepared: nn.Module) -> Any:
    return next(m for m in prepared.modules() if isinstance(m, ConvBn2d))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_without_rounding_it_is_the_float_pair(relu: bool, bias: bool) -> None:
    network = pair(relu, bias=bias, padding=1)
    plain = copy.deepcopy(network)
    prepared = prepare(network)
    set_enabled(prepared, observer=True, fake_quant=False)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        torch.testing.assert_close(prepared(x), plain(x))
    plain[1].eval()
    freeze_bn_statistics(prepared, frozen=True)
    torch.testing.assert_close(prepared(x), plain(x), rtol=1e-4, atol=1e-5)
    prepared.eval()
    torch.testing.assert_close(prepared(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_gradients_without_rounding_are_the_float_pairs() -> None:
    network = pair(bias=False)
    plain = copy.deepcopy(network)
    prepared = prepare(network)
    set_enabled(prepared, observer=True, fake_quant=False)
    for frozen in (False, True):
        x = torch.randn(4, 3, 8, 8)
        freeze_bn_statistics(prepared, frozen=frozen)
        plain[1].train(not frozen)
        for module in (prepared, plain):
            module.zero_grad()
            module(x).square().sum().backward()
        mine = fused(prepared)
        torch.testing.assert_close(mine.weight.grad, plain[0].weight.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.bn.weight.grad, plain[1].weight.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.bn.bias.grad, plain[1].bias.grad, rtol=1e-3, atol=1e-3)


def test_training_forward_rounds_as_the_folded_weight_would() -> None:
    prepared = prepare(pair(bias=False)).train()
    layer = fused(prepared)
    x = torch.randn(4, 3, 8, 8)
    prepared(x)
    layer.weight_fake_quant.disable_observer()
    factor = (layer.bn.weight / torch.sqrt(layer.bn.running_var + layer.bn.eps)).detach()
    folded = layer.weight_fake_quant(layer.weight * factor.view(-1, 1, 1, 1)).detach()
    before = copy.deepcopy(layer.bn)
    expected = before(layer._conv_forward(x, folded, None) / factor.view(1, -1, 1, 1))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_zero_scales_train_and_convert_to_finite_values() -> None:
    network: Any = nn.Sequential(*pair(), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    nn.init.zeros_(network[1].weight)
    nn.init.ones_(network[1].bias)  # so that the ReLU lets gradients pass
    prepared = prepare(network).train()
    first = fused(prepared)
    x = torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    assert torch.equal(first.bn.weight, torch.zeros(8))  # not replaced by something small
    for _ in range(4):
        optimizer.zero_grad()
        (prepared(x) - torch.randn(4, 4, 6, 6)).square().mean().backward()
        optimizer.step()
    assert (first.bn.weight != 0).all()  # the gradient reaches it
    prepared.eval()
    outputs = convert(prepared)(x)
    assert torch.isfinite(outputs).all()
    assert sqnr(prepared(x), outputs) > 20


@pytest.mark.parametrize("frozen", [False, True])
def test_no_observer_moves_in_eval_whether_statistics_are_frozen(frozen: bool) -> None:
    prepared = prepare(pair(relu=True)).train()
    prepared(torch.randn(4, 3, 8, 8))
    freeze_bn_statistics(prepared, frozen=frozen)
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    prepared.eval()
    prepared(torch.randn(4, 3, 8, 8) * 10)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v2",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("mobilenet_v3_large", "efficientnet_b0")),
    ],
)
def test_scale_in_forward_equals_the_converted_modules(name: str) -> None:
    prepared = prepare(getattr(models, name)(num_classes=10), backend="onednn")
    train_steps(prepared, ((torch.randn(4, 3, 64, 64),), {}), steps=2)
    int8: Any = convert(prepared)
    layers: dict[str, Any] = {n: m for n, m in prepared.named_modules() if hasattr(m, "weight_fake_quant")}
    compared = 0
    for layer_name, layer in layers.items():
        scale, zero_point = layer.weight_fake_quant.calculate_qparams()
        assert torch.equal(int8.get_submodule(layer_name).weight_scale, scale), layer_name
        assert not zero_point.any(), layer_name
        compared += 1
    assert compared == len(layers) > 20
    assert all(isinstance(layer.weight_fake_quant, FakeQuantize) for layer in layers.values())


def test_activation_scales_equal_the_converted_modules() -> None:
    prepared: Any = prepare(models.resnet18(num_classes=10), backend="onednn")
    train_steps(prepared, ((torch.randn(4, 3, 64, 64),), {}), steps=2)
    int8: dict[str, Any] = dict(convert(prepared).named_modules())
    compared = 0
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(prepared.get_submodule(node.target), FakeQuantize):
            source = node.args[0]
            layer: Any = int8.get(source.target) if source.op == "call_module" else None
            if not is_int8(layer):
                continue
            scale, zero_point = prepared.get_submodule(node.target).calculate_qparams()
            assert layer.output_qparams() == (float(scale), int(zero_point), 0, 255), source.target
            compared += 1
    assert compared >= 12  # the rest are additions and poolings, which are no modules


def test_bf16_autocast_trains() -> None:
    prepared = prepare(pair(relu=True)).train()
    x: Tensor = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = prepared(x).float().square().mean()
    loss.backward()
    assert torch.isfinite(fused(prepared).weight.grad).all()
    assert sqnr(prepared.eval()(x), convert(prepared)(x)) > 25


@pytest.mark.parametrize("build", [lambda: pair(bias=False), lambda: models.resnet18(num_classes=10)])
def test_a_weight_that_grows_after_the_observers_froze_is_not_clipped(build: Any) -> None:
    """A grid that stayed would clip a channel, which lessens its variance, so that more of it is clipped."""
    torch.manual_seed(0)
    prepared: Any = prepare(build(), backend="onednn")
    batches = [torch.randn(8, 3, 16, 16) for _ in range(4)]
    for x in batches:
        prepared(x)
    enter(prepared, Phase(fake_quant=True, observe=False, freeze_bn=False))
    layers: list[Any] = [m for m in prepared.modules() if isinstance(m, ConvBn2d)]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= 1.3
        for _ in range(20):
            for x in batches:
                prepared(x)
    for layer in layers:
        grid = layer.weight_fake_quant
        needed = grid.magnitude(layer.weight) * layer._factor().abs()
        torch.testing.assert_close(grid.scale * grid.quant_max, needed, rtol=1e-3, atol=1e-5)
    layer, x = layers[0], batches[0]
    spread = layer._conv_forward(prepared.activation_post_process_0(x), layer.weight, None).var((0, 2, 3))
    torch.testing.assert_close(layer.bn.running_var, spread, rtol=0.3, atol=0.02)
