from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from qat_lightning import ConversionError, convert, prepare
from qat_lightning.fake_quant.phases import freeze_bn_statistics, set_enabled
from qat_lightning.quantize.floating import is_int8
from qat_lightning.quantize.recipe import quantized_networks, recipe_of
from tests.networks import (
    CASES,
    Case,
    Residual,
    Stubbed,
    layers_that_differ,
    leaves,
    same_state,
    sqnr,
    train_steps,
)
from tests.runs import dataset, loader

# Mode, model, and how near int8 is to fake-quant in dB. A MobileNetV2 that has hardly been trained
# amplifies every difference: its fake-quant outputs are only 7 to 10 dB from its float ones. Two sums that
# are rounded apart, which ones depends on the CPU, leave 15 to 42 dB; layer by layer the two are equal.
TORCHVISION: dict[str, tuple[str, Callable[[], nn.Module], float]] = {
    "mobilenet_v2-fx": ("fx", lambda: models.mobilenet_v2(num_classes=4), 12),
    "resnet18-fx": ("fx", lambda: models.resnet18(num_classes=4), 35),
    "mobilenet_v2-eager": ("eager", lambda: models.quantization.mobilenet_v2(num_classes=4), 12),
    "resnet18-eager": ("eager", lambda: models.quantization.resnet18(num_classes=4), 35),
}


def int8_kinds(module: nn.Module) -> set[str]:
    """The classes of the int8 layers in a module."""
    return {type(m).__name__ for m in module.modules() if is_int8(m)}


def float_kinds(module: nn.Module) -> set[str]:
    """The classes in a module that still hold float parameters."""
    return {type(m).__name__ for m in module.modules() if list(m.parameters(recurse=False))}


def freeze(prepared: nn.Module) -> None:
    prepared.eval()
    set_enabled(prepared, observer=False, fake_quant=True)


@pytest.mark.parametrize("backend", ["x86", "onednn"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_outputs_are_near_the_fake_quant_outputs(case: Case, backend: str) -> None:
    prepared = prepare(case.build(), mode=case.mode, backend=backend)
    args, kwargs = inputs = case.inputs()
    train_steps(prepared, inputs, steps=8)
    freeze(prepared)
    before = copy.deepcopy(prepared.state_dict())
    int8 = convert(prepared)
    assert same_state(dict(prepared.state_dict()), dict(before)) == []
    assert int8_kinds(int8) & {"Linear", "ConvReLU2d", "Int8Layer"}
    with torch.no_grad():
        ours, theirs = leaves(prepared(*args, **kwargs)), leaves(int8(*args, **kwargs))
    assert len(ours) == len(theirs) > 0
    for reference, output in zip(ours, theirs, strict=True):
        assert sqnr(reference, output) > case.min_sqnr


@pytest.mark.parametrize("backend", ["x86", "onednn"])
@pytest.mark.parametrize("network", [Residual, Stubbed])
def test_a_trained_network_decides_alike_in_int8(network: type[nn.Module], backend: str) -> None:
    """The learning rate moves activations far beyond what was observed at first."""
    prepared = prepare(network(), backend=backend)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05, momentum=0.9)
    for _ in range(6):
        for x, y in loader(shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(prepared(x), y).backward()
            optimizer.step()
    freeze(prepared)
    x, y = dataset(64, seed=2).tensors
    with torch.no_grad():
        fake, int8 = prepared(x), convert(prepared)(x)
    assert sqnr(fake, int8) > 35
    assert (fake.argmax(1) == int8.argmax(1)).float().mean() >= 0.98


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models(name: str) -> None:
    mode, build, min_sqnr = TORCHVISION[name]
    prepared = prepare(build())
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.mode == mode
    labels = torch.arange(16) % 4
    x = _photos(16) + labels.view(-1, 1, 1, 1) - 1.5
    optimizer = torch.optim.Adam(prepared.parameters(), lr=2e-3)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(x), labels).backward()
        optimizer.step()
    _settle(prepared, x)
    int8 = convert(prepared)
    eager = {"Conv2d", "ConvReLU2d", "Linear"}
    assert int8_kinds(int8) >= (eager if mode == "eager" else {"Int8Layer"})
    assert float_kinds(int8) == set()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in int8.modules())
    with torch.no_grad():
        fake, converted = prepared(x), int8(x)
    assert layers_that_differ(prepared, int8, x) == []
    assert sqnr(fake, converted) > min_sqnr
    assert (fake.argmax(1) == converted.argmax(1)).float().mean() > 0.9


def _photos(count: int) -> Tensor:
    coarse = torch.randn(count, 3, 4, 4)
    return nn.functional.interpolate(coarse, size=64, mode="bilinear") + 0.1 * torch.randn(count, 3, 64, 64)


def _settle(prepared: nn.Module, x: Tensor) -> None:
    """Lets batch-norm statistics and ranges settle on one batch, as a long training does."""
    modules: list[Any] = list(prepared.modules())
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
        if hasattr(module, "averaging_constant"):
            module.averaging_constant = 1.0
    with torch.no_grad():
        prepared.train()(x)
        freeze_bn_statistics(prepared, frozen=True)
        prepared(x)
    freeze(prepared)


def test_convert_takes_every_prepared_network_inside_a_module() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = prepare(Residual()), prepare(Stubbed())
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x) + self.second(x))

    module = Two()
    train_steps(module, ((torch.randn(16, 3, 12, 12),), {}))
    int8 = convert(module)
    assert [(n, r.int8, r.mode) for n, _, r in quantized_networks(int8)] == [
        ("first", True, "fx"),
        ("second", True, "eager"),
    ]
    assert [r.int8 for _, _, r in quantized_networks(module)] == [False, False]
    assert type(int8.head) is nn.Linear
    assert int8(torch.randn(2, 3, 12, 12)).shape == (2, 2)


def test_convert_leaves_the_training_mode_of_its_source() -> None:
    prepared = prepare(Residual())
    train_steps(prepared, ((torch.randn(16, 3, 12, 12),), {}))
    prepared.train()
    int8 = convert(prepared)
    assert prepared.training
    assert not any(module.training for module in int8.modules())


@pytest.mark.parametrize("build", [Residual, Stubbed])
def test_convert_before_any_data_says_what_to_do(build: type[nn.Module]) -> None:
    prepared = prepare(build())
    with pytest.raises(ConversionError, match=r"no batch has passed through it in training mode.*Train it"):
        convert(prepared)


def test_convert_of_a_float_or_int8_network_says_what_it_takes() -> None:
    with pytest.raises(ConversionError, match=r"takes a network that `prepare` made.*received Residual"):
        convert(Residual())
    prepared = prepare(Residual())
    train_steps(prepared, ((torch.randn(16, 3, 12, 12),), {}))
    with pytest.raises(ConversionError, match="holds none"):
        convert(convert(prepared))


def test_two_int8_networks_run_each_on_its_own_engine() -> None:
    x = torch.randn(16, 3, 12, 12)
    outputs = {}
    networks = {}
    for backend in ("qnnpack", "onednn"):
        torch.manual_seed(0)
        prepared = prepare(Residual(), backend=backend)
        train_steps(prepared, ((x,), {}))
        networks[backend] = convert(prepared)
        outputs[backend] = networks[backend](x)
    assert torch.equal(networks["qnnpack"](x), outputs["qnnpack"])
    assert torch.equal(networks["onednn"](x), outputs["onednn"])


@pytest.mark.slow
def test_linear_layers_on_onednn_never_run_its_reference_code(tmp_path: Path) -> None:
    """It is what oneDNN falls back to where an input has a zero point."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from qat_lightning import convert, load_int8, prepare, save_int8\n"
        "from torch import nn\n"
        "build = lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))\n"
        "prepared = prepare(build(), backend='onednn').train()\n"
        "x = torch.randn(8, 64)\n"
        "prepared(x)\n"
        "int8 = convert(prepared)\n"
        f"path = save_int8(int8, {str(tmp_path / 'int8.pt')!r})\n"
        "assert torch.equal(int8(x), load_int8(path, build())(x))\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ref_int8" not in done.stdout


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack", "onednn"])
def test_every_engine_runs_where_only_deterministic_operations_are_allowed(backend: str) -> None:
    """fbgemm's linear layer is refused there, for a tensor that it makes and then fills."""
    prepared = prepare(nn.Sequential(nn.Linear(8, 8)), backend=backend).train()
    x = torch.randn(4, 8)
    prepared(x)
    int8 = convert(prepared)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(int8(x), int8(x))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
