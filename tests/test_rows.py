"""Rows of the tables of onnxruntime and openvino, and that the tables of PyTorch's engines lack them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import export_onnx, export_openvino, prepare
from qat_lightning.export.load import load_graph
from qat_lightning.export.runtime import RuntimeNetwork
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from tests.networks import sqnr, train_steps


class Between(nn.Module):
    """An operation between two convolutions."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network_with(operation: Any) -> Between:
    torch.manual_seed(0)
    network = Between(operation)
    network(images())  # its last layer gets its size
    return network


def roundings(operation: Any, backend: str) -> int:
    """How many tensors are rounded, besides weights."""
    prepared = prepare(network_with(operation), backend=backend, example_inputs=(images(),))
    return sum(not name.endswith("weight_fake_quant") for name, _ in fake_quantizes(prepared))


MOVES: dict[str, Callable[[], Any]] = {
    "zeros": lambda: nn.ZeroPad2d(1),
    "reflection": lambda: nn.ReflectionPad2d(1),
    "largest": lambda: nn.AdaptiveMaxPool2d(1),
    "F.adaptive_max_pool2d": lambda: lambda x: F.adaptive_max_pool2d(x, 1),
    "amax": lambda: lambda x: x.amax((2, 3), keepdim=True),
    "mT": lambda: lambda x: x.mT,
    "select": lambda: lambda x: x.select(2, 0).unsqueeze(2),
    "flatten": lambda: lambda x: x.flatten(1).view(2, 4, 6, 6),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "F.interpolate": lambda: lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "concat": lambda: lambda x: torch.concat([x, x], 1),
    "clip": lambda: lambda x: x.clip(0, 1),
}
COMPUTES: dict[str, Callable[[], Any]] = {
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "F.interpolate bilinear": lambda: lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "zeros of another value": lambda: lambda x: F.pad(x, (1, 1), value=1.0),
    "prelu": lambda: nn.PReLU(),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_values_keeps_its_qparams(name: str) -> None:
    """For PyTorch's engines most of these have qparams of their own, as in files of version 0.1.0."""
    assert roundings(MOVES[name](), "onnxruntime") == 3
    assert roundings(MOVES[name](), "x86") == (3 if name == "F.interpolate" else 4)


@pytest.mark.parametrize("name", COMPUTES)
def test_what_computes_has_qparams_of_its_own(name: str) -> None:
    assert roundings(COMPUTES[name](), "onnxruntime") == 4


@pytest.mark.parametrize("operation", [lambda x: x.add(x.sigmoid()), lambda x: x.mul(x.sigmoid())])
def test_sums_and_products_that_are_methods(operation: Any) -> None:
    assert roundings(operation, "onnxruntime") == roundings(lambda x: x + x.sigmoid(), "onnxruntime")


def exported(operation: Any, backend: str, folder: Path) -> tuple[float, dict[str, int]]:
    """How close a file is to what was trained, in dB, and the operations that it computes in float."""
    x = images()
    prepared = prepare(network_with(operation), backend=backend, example_inputs=(x,))
    train_steps(prepared, ((x,), {}))
    if backend == "onnxruntime":
        path = export_onnx(prepared.eval(), folder / "int8.onnx", (x,))
    else:
        path = export_openvino(prepared.eval(), folder / "int8.xml", (x,))
    runtime = load_graph(path)
    with torch.no_grad():
        return sqnr(prepared(x), RuntimeNetwork(runtime)(x)), dict(runtime.float_operations())


def test_onnx_runtime_computes_a_prelu_with_one_slope_in_int8(tmp_path: Path) -> None:
    fidelity, in_float = exported(nn.PReLU(), "onnxruntime", tmp_path)
    assert fidelity > 40
    assert "PRelu" not in in_float
    assert "LeakyRelu" not in in_float
    _, in_float = exported(nn.PReLU(4), "onnxruntime", tmp_path)
    assert in_float == {"PRelu": 1}


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: F.gelu(x).amax((2, 3), keepdim=True),
        lambda x: x.amin(2, keepdim=True),
        nn.AdaptiveMaxPool2d(1),
    ],
    ids=["max", "min", "pool"],
)
@pytest.mark.parametrize("backend", ["openvino", "onednn"])
def test_openvino_rounds_maxima_and_minima(operation: Any, backend: str, tmp_path: Path) -> None:
    """Its own fusion of a ReduceMax with the rounding after it computes something else."""
    fidelity, in_float = exported(operation, backend, tmp_path)
    assert fidelity > 30
    assert not {"ReduceMax", "ReduceMin"} & set(in_float)
