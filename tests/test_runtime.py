"""Exported files in the runtimes they are for, against what was trained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torchvision import models

from qat_lightning import MissingExtraError, QuantizationAwareTraining, export_onnx, export_openvino
from qat_lightning import load_runtime, prepare
from qat_lightning.fidelity import sqnr
from tests.networks import CLASSES, Residual, StubbedLayers, TwoInputs, images, leaves, train_steps
from tests.runs import TinyModule, trainer


class Nested(nn.Module):
    """Takes nested inputs, by name too, and returns nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, batch: dict[str, Any], extra: Tensor) -> dict[str, Any]:
        image = self.conv(batch["image"]).mean((2, 3))
        facts = self.fc(batch["facts"][0] + extra)
        return {"logits": image + facts, "parts": (image, [facts])}


class Island(nn.Module):
    """Int8, float, int8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh())
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu()).mean((2, 3)))


class StubbedIsland(Island):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(super().forward(self.quant(x)))


def pictures(count: int = 4) -> tuple[Tensor]:
    return (torch.randn(count, 3, 64, 64),)


@dataclass(frozen=True)
class Case:
    """A network to export.

    Attributes:
        name: Of the test.
        build: Makes the float network.
        inputs: Its arguments.
        decibels: Least agreement with fake-quant in a runtime's own int8 kernels.
        options: For `prepare`.
        slow: Whether it takes many seconds.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any] = pictures
    decibels: float = 20
    options: dict[str, Any] = field(default_factory=dict)
    slow: bool = False


def torchvision(name: str, **options: Any) -> Case:
    build: Any = getattr(models, name)
    return Case(name, lambda: build(num_classes=CLASSES), slow=name != "mobilenet_v2", **options)


def quantizable(name: str) -> Case:
    build: Any = getattr(models.quantization, name)
    return Case(f"{name}-eager", lambda: build(num_classes=CLASSES), slow=name != "resnet18")


CASES = [
    *map(torchvision, ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")),
    *map(quantizable, ("resnet18", "mobilenet_v2", "mobilenet_v3_large")),
    Case("two_inputs", TwoInputs, lambda: (images(4), torch.randn(4, 5))),
    Case(
        "nested",
        Nested,
        lambda: {"batch": {"image": images(4), "facts": [torch.randn(4, 5)]}, "extra": torch.randn(4, 5)},
    ),
    Case("island", Island, lambda: (images(4),), options={"keep_float": ["middle"]}),
    Case("island-eager", StubbedIsland, lambda: (images(4),), options={"keep_float": ["middle"]}),
]
MARKED = [pytest.param(c, marks=[pytest.mark.slow] if c.slow else [], id=c.name) for c in CASES]


def call(network: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return network(**inputs) if isinstance(inputs, dict) else network(*inputs)


def trained(case: Case) -> nn.Module:
    prepared = prepare(case.build(), **case.options)
    inputs = case.inputs()
    train_steps(prepared, ((), inputs) if isinstance(inputs, dict) else (inputs, {}))
    return prepared.eval()


@pytest.mark.parametrize("case", MARKED)
def test_an_exported_network_follows_fake_quant_in_both_runtimes(case: Case, tmp_path: Path) -> None:
    prepared = trained(case)
    inputs = case.inputs()
    graph = export_onnx(prepared, tmp_path / "int8.onnx", inputs)
    onnx.checker.check_model(onnx.load(graph), full_check=True)
    ir = export_openvino(prepared, tmp_path / "int8.xml", inputs)
    expected = call(prepared, inputs)
    for path in (graph, ir):
        found = call(load_runtime(path), inputs)
        assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(expected)
        for want, got in zip(leaves(expected), leaves(found), strict=True):
            assert sqnr(want, got) > case.decibels
