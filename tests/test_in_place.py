"""Rounding in place: less memory, the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import quantization as quantizable

from benchmarks.train_step import saved_bytes
from qat_lightning import FakeQuantize, convert, prepare
from qat_lightning.fake_quant.numerics import fake_quantize, rectify
from qat_lightning.modes.lowering.int8.tables import Table


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_training_keeps_at_most_a_third_more_than_float(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 160, 160)
    network = getattr(models, name)().train()
    float_bytes = saved_bytes(network, lambda: network(x).sum())
    prepared = prepare(network).train()
    assert saved_bytes(prepared, lambda: prepared(x).sum()) <= 1.3 * float_bytes


def _fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "eager resnet18":
        return quantizable.resnet18(quantize=False).train()
    network: nn.Module = getattr(models, name)().train()
    return network


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "eager resnet18",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("mobilenet_v3_large", "shufflenet_v2_x0_5")
        ),
    ],
)
def test_overwriting_changes_neither_outputs_nor_gradients(name: str) -> None:
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for in_place in (True, False):
        prepared = prepare(_fresh(name)).train()
        grids = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
        assert any(grid.in_place for grid in grids)
        for grid in grids:
            grid.in_place = grid.in_place and in_place
        torch.manual_seed(1)
        outputs = prepared(x)
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        output.square().sum().backward()
        found.append([output, *(p.grad for p in prepared.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Producers(nn.Module):
    """Rounds what each operation makes whose result may be overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), nn.Conv2d(8, 8, 1)
        self.norm = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.silu, self.hardswish = nn.SiLU(inplace=True), nn.Hardswish(inplace=True)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(6))
        self.relu, self.layer_norm = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.LayerNorm(8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs[0](self.silu(self.first(x)))
        x = self.convs[1](self.hardswish(x))
        x = self.convs[2](F.silu(self.plain(x), inplace=True))
        x = self.convs[3](x + self.convs[4](F.gelu(x)))
        x = self.convs[5](self.norm(torch.cat((x[:, :4], x[:, 4:] * x[:, :4]), 1)))
        rows = x.flatten(2).transpose(1, 2)
        return self.last(self.layer_norm(self.relu(rows)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["x86", "onnxruntime", "openvino"])
def test_whatever_is_overwritten_outputs_and_gradients_stay(backend: str) -> None:
    x = torch.randn(4, 3, 5, 5)
    torch.manual_seed(0)
    network = Producers().train()
    found = []
    for in_place in (True, False):
        prepared = prepare(copy.deepcopy(network), backend=backend).train()
        grids = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
        assert sum(grid.in_place for grid in grids) == {"x86": 17, "onnxruntime": 15, "openvino": 9}[backend]
        for grid in grids:
            grid.in_place = grid.in_place and in_place
        for _ in range(3):
            output = prepared(x)
            output.square().sum().backward()
        found.append([output, *(p.grad for p in prepared.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_smooth_activation_keeps_its_input_and_is_not_copied() -> None:
    prepared: Any = prepare(Producers()).train()
    assert not prepared.silu.inplace
    assert not prepared.hardswish.inplace
    assert all(not node.kwargs for node in prepared.graph.nodes if node.target is F.silu)


def test_a_view_is_not_overwritten() -> None:
    base = torch.randn(2, 6, requires_grad=True) * 1
    before = base.detach().clone()
    rectify(base.view(3, 4), in_place=True)
    step, zero = torch.tensor([0.1]), torch.tensor([3])
    fake_quantize(base.view(3, 4), step, zero, 0, 255, in_place=True)
    assert torch.equal(base, before)


def test_evaluation_overwrites_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    prepared = prepare(network).train()
    x = torch.randn(2, 3, 8, 8)
    prepared(x)
    outputs: list[torch.Tensor] = []
    prepared.eval().get_submodule("0").register_forward_hook(lambda *args: outputs.append(args[-1]))
    prepared(x)
    (before,) = outputs
    grid = next(m for m in prepared.modules() if isinstance(m, FakeQuantize) and m.in_place)
    assert not torch.equal(before, grid(before))


class TwoReaders(nn.Module):
    """Returns the tensor of a ReLU beside what a layer makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x)
        y = torch.relu(y + y)
        return self.b(y), torch.sigmoid(y)


def test_int8_fuses_the_relu_that_training_replaced() -> None:
    prepared = prepare(TwoReaders()).train()
    assert any(node.target is rectify for node in prepared.graph.nodes)  # type: ignore[union-attr]
    prepared(torch.randn(4, 3, 8, 8))
    int8: Any = convert(prepared)
    kinds = [type(module) for module in int8.modules()]
    assert kinds.count(Table) == 2  # the sum with its ReLU, and the sigmoid
    assert rectify not in [node.target for node in int8.graph.nodes]


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    in_place=st.booleans(),
)
def test_rectify_is_relu(shape: list[int], dtype: torch.dtype, in_place: bool) -> None:
    source = torch.randn(shape, dtype=dtype).requires_grad_()
    weight = torch.randn(shape, dtype=dtype)
    results = []
    for function in (lambda x: rectify(x, in_place), torch.relu):
        y = function(source * 1)
        (grad,) = torch.autograd.grad((y * weight).sum(), source)
        results.append((y, grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
