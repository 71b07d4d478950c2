"""What surrounds operations in a forward does not vanish from its graph; integers stay integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat_lightning import (
    GuardError,
    UntraceableError,
    convert,
    export_onnx,
    load_int8,
    load_runtime,
    preflight,
    prepare,
    save_int8,
)
from qat_lightning.quantize.recipe import recipe_of

EXAMPLES = [None, torch.randn(4, 8)]
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=["symbolic", "captured"])


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)


class FrozenBackbone(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.relu(self.a(x))
        y: Tensor = self.b(x)
        return y


@each_example
def test_no_grad_is_followed(example: Tensor | None) -> None:
    prepared = prepare(FrozenBackbone(), example_inputs=example).train()
    x = torch.randn(4, 8)
    prepared(x).sum().backward()
    assert [name for name, p in prepared.named_parameters() if p.grad is not None] == ["b.weight", "b.bias"]
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.layers == ("a", "b")
    assert torch.equal(convert(prepared)(x), prepared.eval()(x))


class Triple(torch.autograd.Function):
    """Rounds, with a gradient of 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 3


class WithFunction(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(Triple.apply(self.a(x)))
        return y


@each_example
def test_an_autograd_function_keeps_its_backward(example: Tensor | None) -> None:
    x = torch.randn(4, 8)
    prepared: Any = prepare(WithFunction(), example_inputs=example)
    prepared.train()(x).sum().backward()
    gradient = prepared.a.bias.grad
    weights = prepared.b.weight_fake_quant(prepared.b.weight).sum(0)
    torch.testing.assert_close(gradient, 3 * 4 * weights)
    assert torch.equal(convert(prepared)(x), prepared.eval()(x))


class Checkpointed(TwoLayers):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(checkpoint(self.a, x, use_reentrant=self.reentrant))
        return y


@each_example
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_refused(reentrant: bool, example: Tensor | None) -> None:
    with pytest.raises(UntraceableError, match=r"checkpointing(.|\n)*test_contexts\.py:\d+"):
        prepare(Checkpointed(reentrant=reentrant), example_inputs=example)
    x = torch.randn(4, 8, requires_grad=True)
    Checkpointed(reentrant=reentrant)(x).sum().backward()  # what torch does is as before


class Autocast(TwoLayers):
    def __init__(self, *, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            y: Tensor = self.b(self.a(x))
        return y


class Around(nn.Module):
    def __init__(self, *, enabled: bool) -> None:
        super().__init__()
        self.part, self.head = Autocast(enabled=enabled), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.part(x).float())
        return y


@each_example
def test_autocast_is_refused_and_its_module_can_stay_float(example: Tensor | None) -> None:
    with pytest.raises(UntraceableError, match=r"autocast(.|\n)*test_contexts\.py:\d+: with torch\.autocast"):
        prepare(Around(enabled=True), example_inputs=example)
    prepared: Any = prepare(Around(enabled=True), example_inputs=example, untraceable="float")
    assert prepared.qat_recipe.layers == ("head",)
    assert prepared(torch.randn(4, 8)).shape == (4, 8)


@each_example
def test_a_graph_without_autocast_runs_in_full_precision_only(example: Tensor | None) -> None:
    prepared = prepare(Around(enabled=False), example_inputs=example)
    x = torch.randn(4, 8)
    prepared(x)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(GuardError, match="32-true"):
        prepared(x)
    assert convert(prepared)(x).shape == (4, 8)


class Lengths(nn.Module):
    """Computes the lengths of its outputs beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), torch.cat([(lengths - 3) // 2 + 1, lengths])


@pytest.mark.parametrize("captured", [False, True])
def test_integers_stay_integers(captured: bool, tmp_path: Path) -> None:
    inputs = torch.randn(3, 8, 16), torch.tensor([16, 9, 3])
    right = torch.tensor([7, 4, 1, 16, 9, 3])
    prepared = prepare(Lengths(), example_inputs=inputs if captured else None)
    assert torch.equal(prepared(*inputs)[1], right)
    y, found = prepared.eval()(*inputs)
    assert torch.equal(found, right)
    int8 = convert(prepared)
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), Lengths())
    runtime = load_runtime(export_onnx(prepared, tmp_path / "int8.onnx", inputs))
    for network in (int8, loaded, runtime):
        outputs, found = network(*inputs)
        assert torch.equal(found, right)
        torch.testing.assert_close(outputs, y, rtol=0, atol=0.02)
    assert torch.equal(loaded(*inputs)[0], int8(*inputs)[0])


class LossInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor, target: Tensor | None = None, return_loss: bool = True) -> Tensor:
        y: Tensor = self.fc(x)
        return nn.functional.cross_entropy(y, target) if return_loss else y  # type: ignore[arg-type]


def test_a_loss_in_the_forward_follows_the_example() -> None:
    x, target = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    for example in ((x, target), {"x": x, "return_loss": False}):
        prepared = prepare(LossInForward(), example_inputs=example)
        (report,) = preflight(LossInForward(), example)
        assert report.layers == 1
        args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
        assert prepared(*args, **kwargs).requires_grad
    with pytest.raises(GuardError, match="target=None, but it is called with target=a Tensor"):
        prepare(LossInForward())(x, target)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("options", [{"untraceable": "float"}, {"keep_float": ["1"]}])
def test_a_torchscript_part_is_one_float_call(options: dict[str, Any]) -> None:
    part = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), part)
    x = torch.randn(2, 3, 8, 8)
    for example in (None, x):
        prepared: Any = prepare(network, example_inputs=example, **options)
        assert prepared.qat_recipe.layers == ("0",)
        prepared(x)
        torch.testing.assert_close(convert(prepared)(x), prepared.eval()(x))
    (report,) = preflight(network, x, **options)
    assert report.layers == 1
