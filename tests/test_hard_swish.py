"""Hard-swishes: the grid that their input gets, and the product of integers that ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from qat_lightning import convert, export_onnx, export_openvino, prepare
from qat_lightning.export.load import load_graph
from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.fake_quant.numerics import affine_qparams
from tests.networks import CLASSES, StubbedLayers, images, sqnr, train_steps

onnx_ir = pytest.importorskip("onnx_ir")
from qat_lightning.export.hard_swish import as_products  # noqa: E402


class Called(nn.Module):
    """Calls the function, as code of one's own does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.hardswish(self.bn(self.conv(x)))).mean((2, 3))


def layered() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, CLASSES, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def widened(network: nn.Module, spread: float) -> nn.Module:
    """With batch-norms whose results have this standard deviation."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, spread)
    return network


def trained(network: nn.Module, **options: Any) -> nn.Module:
    prepared = prepare(network, **options)
    train_steps(prepared, ((images(),), {}))
    return prepared


def fitted(prepared: nn.Module) -> list[FakeQuantize]:
    return [m for m in prepared.modules() if isinstance(m, FakeQuantize) and m.exact_value is not None]


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# The grid


@settings(max_examples=200, deadline=None)
@given(low=st.floats(-50, 0), high=st.floats(0, 50), greatest=st.sampled_from([127, 255]))
def test_an_exact_value_hardly_widens_the_scale(low: float, high: float, greatest: int) -> None:
    low, high = min(low, -1e-3), max(high, 1e-3)
    ends = (torch.tensor([low]), torch.tensor([high]), 0, greatest, 1e-7)
    plain, (scale, zero_point) = affine_qparams(*ends)[0], affine_qparams(*ends, exact_value=3.0)
    steps = 3 / float(scale)
    assert abs(steps - round(steps)) < 1e-6 * steps
    assert float(plain) <= float(scale) * (1 + 1e-6)
    assert float(scale) <= float(plain) * (1 + 1 / round(steps)) * (1 + 1e-6)
    assert -int(zero_point) * float(scale) <= low + 0.51 * float(scale)
    assert (greatest - int(zero_point)) * float(scale) >= high - 0.51 * float(scale)


def test_a_scale_above_the_exact_value_stays() -> None:
    ends = (torch.tensor([-600.0]), torch.tensor([600.0]), 0, 255, 1e-7)
    assert affine_qparams(*ends, exact_value=3.0) == affine_qparams(*ends)


@pytest.mark.parametrize(
    ("build", "mode"),
    [(layered, "fx"), (Called, "fx"), (lambda: StubbedLayers(layered()), "eager")],
    ids=["module", "call", "eager"],
)
@pytest.mark.parametrize("backend", ["x86", "onednn", "qnnpack"])
def test_what_a_hard_swish_reads_lies_on_a_grid_that_holds_3(
    build: Callable[[], nn.Module], mode: str, backend: str
) -> None:
    prepared = trained(build(), mode=mode, backend=backend)
    (grid,) = fitted(prepared)
    steps = 3 / float(grid.scale)
    assert abs(steps - round(steps)) < 1e-6 * steps
    x = images()
    with torch.no_grad():
        assert sqnr(prepared(x), convert(prepared)(x)) > 40


def test_each_hard_swish_of_a_network_is_found() -> None:
    prepared = prepare(models.mobilenet_v3_large(num_classes=CLASSES))
    assert len(fitted(prepared)) == 21


def test_a_qconfig_of_ones_own_keeps_its_grid() -> None:
    assert not fitted(trained(layered(), qconfig="torch"))


# The product


def graph(scale: float, zero_point: int) -> bytes:
    """Bytes to bytes, with a hard-swish between them."""
    grid = [
        numpy_helper.from_array(torch.tensor(scale).numpy(), "scale"),
        numpy_helper.from_array(torch.tensor(zero_point, dtype=torch.uint8).numpy(), "zero"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("HardSwish", ["x"], ["y"]),
    ]
    given_, made = (
        helper.make_tensor_value_info("q", TensorProto.UINT8, [256]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [256]),
    )
    body = helper.make_graph(nodes, "test", [given_], [made], grid)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def rewritten(content: bytes) -> onnx.ModelProto:
    model = as_products(onnx_ir.from_proto(onnx.load_from_string(content)))
    return onnx_ir.to_proto(model)


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 255), zero_point=st.integers(0, 255))
def test_the_product_is_the_hard_swish(steps: int, zero_point: int) -> None:
    import onnxruntime

    model = rewritten(graph(3 / steps, zero_point))
    assert ("Clip" in {node.op_type for node in model.graph.node}) == (steps <= zero_point)
    onnx.checker.check_model(model)
    integers = torch.arange(256, dtype=torch.uint8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"q": integers.numpy()})
    x = (integers.double() - zero_point) * 3 / steps
    torch.testing.assert_close(torch.from_numpy(y).double(), F.hardswish(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.05001, 3 / 7.5, 4.0])
def test_another_grid_keeps_its_hard_swish(scale: float) -> None:
    assert [node.op_type for node in rewritten(graph(scale, 128)).graph.node] == [
        "DequantizeLinear",
        "HardSwish",
    ]


@pytest.mark.parametrize(("backend", "decibels"), [("x86", 38), ("onednn", 40)])
def test_onnx_runtime_computes_it_in_int8(tmp_path: Path, backend: str, decibels: float) -> None:
    prepared = trained(widened(layered(), 2.0), backend=backend)
    path = export_onnx(prepared, tmp_path / "int8.onnx", (images(),), min_sqnr=decibels)
    assert "HardSwish" not in kinds(path)
    assert not load_graph(path).float_operations()
    export_openvino(prepared, tmp_path / "int8.xml", (images(),), min_sqnr=decibels)


def test_one_that_never_reaches_its_lower_end_stays_float(tmp_path: Path) -> None:
    prepared = trained(widened(layered(), 0.2))
    path = export_onnx(prepared, tmp_path / "int8.onnx", (images(),))
    assert kinds(path).count("HardSwish") == 1


@pytest.mark.slow
def test_squeeze_and_excitation_alone_is_left_in_float(tmp_path: Path) -> None:
    network = widened(models.mobilenet_v3_small(num_classes=CLASSES), 3.0)
    prepared, inputs = prepare(network), (torch.randn(4, 3, 64, 64),)
    train_steps(prepared, (inputs, {}), steps=2)
    path = export_onnx(prepared, tmp_path / "int8.onnx", inputs, min_sqnr=0)
    left = kinds(path).count("HardSwish")
    assert left <= 2  # after the last linear layer, which has no batch-norm, and where the image is one pixel
    found = load_graph(path).float_operations()
    assert found["HardSigmoid"] == 9 + left  # those of squeeze-and-excitation
