"""Mixed precision and compilation: a run of each kind trains and converts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat_lightning import QuantizationAwareTraining, convert, prepare
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from tests.networks import Residual, images, sqnr
from tests.runs import TinyModule, trainer
from tests.trained import digits, trained_digits_network


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_converts_to_what_it_trained(tmp_path: Path, precision: Any) -> None:
    module = TinyModule()
    qat = QuantizationAwareTraining(backend="onednn", convert="last")
    trainer(tmp_path, qat, max_epochs=2, precision=precision).fit(module)
    for name, grid in fake_quantizes(module):
        assert grid.scale.dtype == torch.float32, name
    assert qat.int8_module is not None
    x = images(32)
    with torch.no_grad():
        assert sqnr(module.eval()(x), qat.int8_module(x)) > 35


@pytest.mark.parametrize(("backend", "decibels"), [("x86", 38), ("onednn", 44), ("qnnpack", 44)])
def test_int8_follows_fake_quant_on_trained_digits(backend: str, decibels: float) -> None:
    prepared = trained_digits_network(backend=backend)
    x = digits()[0][1400:]
    with torch.no_grad():
        expected, found = prepared(x), convert(prepared)(x)
    assert sqnr(expected, found) > decibels
    assert (expected.argmax(1) == found.argmax(1)).float().mean() > 0.99


def test_ours_follows_more_closely_than_torchs_default() -> None:
    x = digits()[0][1400:]
    found = {}
    for qconfig in (None, "torch"):
        prepared = trained_digits_network(backend="onednn", qconfig=qconfig)
        with torch.no_grad():
            found[qconfig] = sqnr(prepared(x), convert(prepared)(x))
    assert found[None] > found["torch"] + 5


def test_a_prepared_network_compiles_and_trains_as_without() -> None:
    eager = prepare(Residual()).train()
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    prepared = copy.deepcopy(eager)
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = images(4)
        left, right = eager(x), compiled(x)
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
        left.square().sum().backward()
        right.square().sum().backward()
    for (name, a), b in zip(eager.named_parameters(), prepared.parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2, msg=name)
