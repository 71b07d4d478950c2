"""A forward that writes into its network, or draws from its generator, is refused before it does."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import UntraceableError, convert, prepare
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.quantize.recipe import recipe_of
from tests.networks import CLASSES, ConvBnRelu, images
from tests.test_asking_changes_nothing import asked

Write = Callable[[Any, Tensor], Any]


def _add_in_place(self: Any, y: Tensor) -> None:
    self.steps += 1


def _set_item(self: Any, y: Tensor) -> None:
    self.mean[0] = 1


def _set_items(self: Any, y: Tensor) -> None:
    self.mean[:] = y.detach()[0]


def _average(self: Any, y: Tensor) -> None:
    with torch.no_grad():
        self.mean.lerp_(y[0], 0.1)


def _if_training(self: Any, y: Tensor) -> None:
    if self.training:
        self.mean.copy_(y.detach()[0])


def _caught(self: Any, y: Tensor) -> None:
    with suppress(ValueError):
        self.steps.add_(1)


WRITES: dict[str, Write] = {
    "steps.add_": lambda self, y: self.steps.add_(1),
    "steps +=": _add_in_place,
    "mul_": lambda self, y: self.mean.mul_(2),
    "copy_": lambda self, y: self.mean.copy_(torch.ones(8) * 3),
    "copy_ of a result": lambda self, y: self.mean.copy_(y.detach()[0]),
    "[0] =": _set_item,
    "[:] =": _set_items,
    "lerp_": _average,
    "if training": _if_training,
    "caught": _caught,
    "data": lambda self, y: self.mean.data.add_(1),
    "view": lambda self, y: self.mean[2:].add_(1),
    "view of a result": lambda self, y: self.mean[2:].add_(y.detach()[0, 2:]),
    "foreach": lambda self, y: torch._foreach_add_([self.mean], 1),
    "out": lambda self, y: torch.add(self.mean, 1, out=self.mean),
    "plain": lambda self, y: self.plain.add_(1),
    "in a list": lambda self, y: self.several[1].add_(1),
    "in a held object": lambda self, y: self.held.mean.add_(1),
    "parameter": lambda self, y: self.scale.data.mul_(0.5),
}

DRAWS: dict[str, Write] = {
    "torch": lambda self, y: torch.rand(2, generator=self.torch_generator),
    "seeded": lambda self, y: self.torch_generator.manual_seed(7),
    "in an object": lambda self, y: torch.randn(2, generator=self.held.generator),
    "python": lambda self, y: self.python_generator.random(),
    "numpy": lambda self, y: self.numpy_generator.normal(),
    "older numpy": lambda self, y: self.random_state.rand(),
}


class Part(nn.Module):
    """Does something to itself in each forward."""

    def __init__(self, act: Write) -> None:
        super().__init__()
        self.act, self.conv = act, nn.Conv2d(8, 8, 1)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mean", torch.full((8,), 2.0))
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        self.plain, self.several = torch.zeros(8), [torch.zeros(2), torch.zeros(2)]
        self.torch_generator = torch.Generator().manual_seed(3)
        self.held = SimpleNamespace(mean=torch.zeros(2), generator=torch.Generator())
        self.python_generator, self.numpy_generator = random.Random(3), np.random.default_rng(3)
        self.random_state = np.random.RandomState(3)

    def forward(self, y: Tensor) -> Tensor:
        self.act(self, y.mean((2, 3)))
        return self.conv(y) * self.scale[:, None, None]

    def tensors(self) -> list[Tensor]:
        found = [*self.state_dict().values(), self.plain, *self.several, self.held.mean]
        return [each.clone() for each in found]

    def generators(self) -> list[Any]:
        return [
            self.torch_generator.get_state().tolist(),
            self.held.generator.get_state().tolist(),
            self.python_generator.getstate(),
            self.numpy_generator.bit_generator.state,
            str(self.random_state.get_state()),
        ]


class Whole(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part, self.fc = ConvBnRelu(), part, nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.part(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("name", [*WRITES, *DRAWS])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_as_it_was(name: str, training: bool) -> None:
    part = Part({**WRITES, **DRAWS}[name])
    network = Whole(part).train(training)
    tensors, generators = part.tensors(), part.generators()
    error = asked(network, lambda: prepare(network))
    assert isinstance(error, UntraceableError)
    assert "writes into" in str(error) or "draws random numbers from" in str(error)
    assert "untraceable='float'" in str(error)
    assert error.part == "part"
    assert all(map(torch.equal, tensors, part.tensors()))
    assert generators == part.generators()


@pytest.mark.parametrize("name", ["steps.add_", "[0] =", "copy_ of a result", "parameter"])
def test_the_line_is_named(name: str) -> None:
    with pytest.raises(UntraceableError, match=r"at .*test_writes_in_forward\.py:\d+: \S"):
        prepare(Whole(Part(WRITES[name])))


@pytest.mark.parametrize("training", [True, False])
def test_as_a_float_part_it_writes_once_a_forward(training: bool) -> None:
    network = Whole(Part(WRITES["steps.add_"]))
    prepared = prepare(network, untraceable="float")
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert recipe.layers == ("stem.conv", "fc")
    steps = prepared.get_buffer("part.steps")
    assert steps is network.part.steps
    prepared.train()(images())
    assert steps == 1
    prepared.train(training)
    for count in (2, 3):
        prepared(images())
        assert steps == count
    int8 = convert(prepared)
    int8(images())
    assert steps == 3
    assert int8.get_buffer("part.steps") == 4


def test_a_part_without_layers_is_called_as_a_whole_in_any_case() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("steps").add_(1)
            return x

    prepared = prepare(Whole(Counter()))
    steps = prepared.get_buffer("part.steps")
    assert steps == 0
    prepared.train()(images())
    prepared.eval()(images())
    assert steps == 2


def test_as_a_float_part_it_draws_new_numbers() -> None:
    part = Part(DRAWS["torch"])
    before = part.generators()[0]
    prepared = prepare(Whole(part), untraceable="float").train()
    assert part.generators()[0] == before
    prepared(images())
    assert part.generators()[0] != before


def test_a_part_that_another_writes_into() -> None:
    class Outer(Whole):
        def forward(self, x: Tensor) -> Tensor:
            self.part.get_buffer("steps").add_(1)
            return super().forward(x)

    network = Outer(Part(lambda self, y: None))
    for untraceable in ("error", "float"):
        error = asked(network, lambda: prepare(network, untraceable=untraceable))  # noqa: B023
        assert "writes into 'steps'" in str(error)


class OwnNorm(nn.BatchNorm2d):
    """Counts its batches itself, as torch.nn's batch-norm does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.relu(
            F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                self.momentum or 0.0, self.eps,
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        lambda: Whole(nn.Sequential(nn.Conv2d(8, 8, 1), OwnNorm(8))),
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
    ],
)
def test_batch_norms_count_their_batches(build: Callable[[], nn.Module]) -> None:
    network = build()
    counters = {name: b for name, b in network.named_buffers() if name.endswith("num_batches_tracked")}
    prepared = prepare(network)
    assert not any(counters.values())
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        prepared.train()(x)
    prepared.eval()(x)
    counts = [b for name, b in prepared.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counts) == len(counters) > 0
    assert all(count == 2 for count in counts)


def test_tensors_of_the_forward_may_be_written_into() -> None:
    class Local(ConvBnRelu):
        def forward(self, x: Tensor) -> Tensor:
            weights = torch.zeros(8)
            weights[0] = 1
            weights.add_(1)
            y = super().forward(x)
            y.mul_(2)
            generator = torch.Generator().manual_seed(1)
            return y * weights[:, None, None] + torch.rand(1, generator=generator)

    network = Whole(nn.Identity())
    network.stem = Local()
    x = images()
    expected = network.eval()(x)
    prepared = prepare(network)
    set_enabled(prepared, observer=False, fake_quant=False)
    torch.testing.assert_close(prepared.eval()(x), expected)


def test_a_result_written_into_a_tensor_of_the_forward_is_refused() -> None:
    class Local(ConvBnRelu):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            mean = torch.zeros(8)
            mean += y.detach().mean((0, 2, 3))
            total = torch.zeros(8)
            total.add_(mean)
            return y * total[:, None, None]

    network = Whole(nn.Identity())
    network.stem = Local()
    with pytest.raises(UntraceableError, match="writes into a constant tensor"):
        prepare(network)
