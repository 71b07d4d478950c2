"""Capture: an example decides the path, and the graph does what the network does, for other sizes too."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
from qat_lightning.base.inputs import Inputs
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.quantize.example_inputs import as_inputs
from qat_lightning.quantize.recipe import recipe_of
from qat_lightning.quantize.stored_example import restore, store
from tests.captured import CASES, Attention, BySize, Caching, Case, Output, Pair, WithOptions
from tests.networks import sqnr


def call(network: nn.Module, inputs: Any) -> Any:
    """Calls a network as `example_inputs` describes it."""
    args, kwargs = as_inputs(inputs)
    return network(*args, **kwargs)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Output):
        value = vars(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in tensors(item)]


def prepared_without_rounding(case: Case) -> tuple[nn.Module, nn.Module]:
    """The float network, and the prepared one with rounding off."""
    network = case.build()
    prepared = prepare(copy.deepcopy(network), example_inputs=case.example)
    set_enabled(prepared, observer=False, fake_quant=False)
    return network, prepared


def trained(case: Case) -> nn.Module:
    """A prepared network that has seen data, in eval mode."""
    prepared = prepare(case.build(), example_inputs=case.example)
    for inputs in (case.example, case.other, case.example):
        call(prepared, inputs)
    return prepared.eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_symbolic_tracing_does_not_follow_them(case: Case) -> None:
    if case is CASES["options"]:
        pytest.skip("it is traced, with the defaults of its options")
    with pytest.raises(UntraceableError, match="example_inputs"):
        prepare(case.build())


@pytest.mark.parametrize("training", [True, False])
def test_the_graph_does_what_the_network_does(case: Case, training: bool) -> None:
    network, prepared = prepared_without_rounding(case)
    network.train(training)
    prepared.train(training)
    for inputs in (case.example, case.other):
        expected, found = call(network, inputs), call(prepared, inputs)
        assert type(found) is type(expected)
        for a, b in zip(tensors(expected), tensors(found), strict=True):
            torch.testing.assert_close(a, b)


def test_every_layer_is_in_the_graph(case: Case) -> None:
    network = case.build()
    layers = {name for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    recipe = recipe_of(prepare(network, example_inputs=case.example))
    assert recipe is not None
    assert set(recipe.layers) == layers


def test_int8_equals_fake_quant(case: Case, tmp_path: Path) -> None:
    prepared = trained(case)
    int8 = convert(prepared)
    for inputs in (case.example, case.other):
        for a, b in zip(tensors(call(prepared, inputs)), tensors(call(int8, inputs)), strict=True):
            assert sqnr(a, b) > 40
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), case.build())
    for a, b in zip(tensors(call(int8, case.other)), tensors(call(loaded, case.other)), strict=True):
        assert torch.equal(a, b)


def test_what_a_forward_caches_is_as_before() -> None:
    network = Caching()
    before, anchors = dict(vars(network)), network.anchors
    prepared: Any = prepare(network, example_inputs=torch.randn(2, 3, 8, 8))
    assert vars(network) == before
    assert network.anchors is anchors
    assert prepared.shape is None


class CachingByHeight(Caching):
    """Compares the parts of a cached pair, whose default is the class's."""

    shape: Any = None

    def __init__(self) -> None:
        super().__init__()
        del self.shape

    def forward(self, x: Tensor) -> Pair:
        y = self.conv(x)
        size = (y.shape[2], y.shape[3])
        if size != self.shape:
            self.anchors, self.shape = torch.arange(size[1], device=y.device) + 0.5, size
        return Pair(y, y * self.anchors)


@pytest.mark.parametrize("build", [Caching, CachingByHeight])
def test_what_a_cache_holds_from_an_earlier_run_decides_nothing(build: type[Caching]) -> None:
    images = {size: torch.randn(5, 3, *size) for size in ((6, 6), (6, 8), (8, 6))}
    network = build().eval()
    network(images[6, 6])
    prepared = prepare(copy.deepcopy(network), example_inputs=torch.randn(2, 3, 6, 8)).eval()
    set_enabled(prepared, observer=False, fake_quant=False)
    for each in images.values():
        for found, expected in zip(prepared(each), network(each), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("build", [Caching, CachingByHeight])
def test_a_network_that_has_run_makes_the_graph_of_a_fresh_one(build: type[Caching], tmp_path: Path) -> None:
    network, fresh, images = build().eval(), build(), torch.randn(5, 3, 6, 6)
    network(images)
    prepared = prepare(network, example_inputs=torch.randn(2, 3, 6, 8))
    prepared.train()(images)
    int8 = convert(prepared)
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), fresh)
    for found, expected in zip(loaded(images), int8(images), strict=True):
        assert torch.equal(found, expected)


class CachingAndDeciding(Caching):
    """Decides by a number that its cache happens to hold, too."""

    def forward(self, x: Tensor) -> Pair:
        y = self.conv(x)
        height = y.shape[2]
        if height == 6:
            y = y * 2
        if self.shape != height:
            self.anchors, self.shape = torch.arange(y.shape[3], device=y.device) + 0.5, height
        return Pair(y, y * self.anchors)


def test_the_input_decides_beside_a_cache() -> None:
    network = CachingAndDeciding().eval()
    network(torch.randn(5, 3, 6, 8))
    prepared = prepare(network, example_inputs=torch.randn(2, 3, 8, 8)).eval()
    prepared(torch.randn(5, 3, 7, 8))
    with pytest.raises(GuardError, match="height == 6"):
        prepared(torch.randn(5, 3, 6, 8))


class DecidingByAnAttribute(Caching):
    """Decides by an attribute that it does not store."""

    def forward(self, x: Tensor) -> Pair:
        y = self.conv(x)
        if self.shape != y.shape:
            self.anchors = torch.arange(y.shape[3], device=y.device) + 0.5
        else:
            self.anchors = torch.zeros(1)
        return Pair(y, y * self.anchors)


def test_an_attribute_that_a_forward_does_not_store_still_decides() -> None:
    network = DecidingByAnAttribute().eval()
    network.shape = (5, 4, 6, 6)
    prepared = prepare(network, example_inputs=torch.randn(2, 3, 6, 8)).eval()
    prepared(torch.randn(5, 3, 6, 8))
    with pytest.raises(GuardError, match=r"self\.shape != y\.shape"):
        prepared(torch.randn(5, 3, 6, 6))


def test_an_input_that_takes_another_path_raises_with_its_line() -> None:
    prepared = prepare(BySize(), example_inputs=torch.randn(2, 3, 8, 8))
    with pytest.raises(
        GuardError, match=r"decided by True.*\n  at .*captured\.py:\d+: if x\.shape\[2\] > 4:"
    ):
        prepared(torch.randn(2, 3, 4, 8))
    convert_after_data = convert(trained(CASES["size"]))
    with pytest.raises(GuardError, match="decided by True"):
        convert_after_data(torch.randn(2, 3, 4, 8))


def test_another_call_than_the_examples_raises() -> None:
    prepared = prepare(WithOptions(), example_inputs=({"x": torch.randn(2, 8)},))
    with pytest.raises(GuardError, match=r"scale=1\.0, but it is called with scale=3\.0"):
        prepared({"x": torch.randn(2, 8)}, scale=3.0)
    with pytest.raises(GuardError, match="mask=None"):
        prepared({"x": torch.randn(2, 8)}, mask=torch.ones(2))
    ids = prepare(Attention(), example_inputs=torch.ones(2, 12, dtype=torch.long))
    with pytest.raises(GuardError, match=r"an integer or bool tensor of 2 dimensions.*of 3 dimensions"):
        ids(torch.ones(2, 12, 1, dtype=torch.long))


class GuardedInTraining(nn.Module):
    """Decides by a size in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        if self.training and len(x) == 2:
            y = y * 2
        return y


def test_a_guard_concerns_the_mode_that_decides() -> None:
    prepared = prepare(GuardedInTraining(), example_inputs=torch.randn(2, 4))
    prepared(torch.randn(2, 4))
    with pytest.raises(GuardError):
        prepared(torch.randn(3, 4))
    assert prepared.eval()(torch.randn(3, 4)).shape == (3, 4)
    assert convert(prepared)(torch.randn(5, 4)).shape == (5, 4)


class Settling(nn.Module):
    """Shifts no image that fits its window, as transformers' Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift = nn.Conv2d(3, 4, 1), 3

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) <= 7:
            self.shift = 0
        y: Tensor = self.conv(torch.roll(x, self.shift, -1) if self.shift else x)
        return y


def test_an_attribute_may_settle_by_the_size_of_the_input() -> None:
    small, large = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 9, 9)
    network = Settling()
    plain = copy.deepcopy(network)
    for example, other in ((small, large), (large, small)):
        prepared = prepare(copy.deepcopy(network), example_inputs=example)
        assert recipe_of(prepared).layers == ("conv",)  # type: ignore[union-attr]
        set_enabled(prepared, observer=False, fake_quant=False)
        torch.testing.assert_close(prepared(example), copy.deepcopy(plain)(example))
        with pytest.raises(GuardError):
            prepared(other)
    assert network.shift == 3


class Counting(nn.Module):
    """Counts its calls in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.fc(x) * len(x)
        return y


class CountingInABuffer(Counting):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps: Any
        self.steps += 1
        y: Tensor = self.fc(x)
        return y


class CountingFromTheClass(nn.Module):
    """Counts its calls from a number of the class."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.fc(x) * len(x)
        return y


class Remembering(Counting):
    """Adds what it computed in its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.add(self.fc(x), self.last)
        self.last = y
        return y


class ReadingAStaleView(Counting):
    """Writes to a tensor, and reads it through a view that it took before."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).clone()
        view = y[:, 0]
        y[:, 0] = 0
        return y + view[:, None]


@pytest.mark.parametrize(
    "build", [Counting, CountingInABuffer, CountingFromTheClass, Remembering, ReadingAStaleView]
)
def test_state_that_a_graph_would_lose_is_refused(build: type[Counting]) -> None:
    network = build()
    before = copy.deepcopy(vars(network)), copy.deepcopy(network.state_dict())
    with pytest.raises(UntraceableError, match=r"test_capture\.py|forward"):
        prepare(network, example_inputs=torch.randn(2, 4))
    assert network.calls == 0
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before[1].items())
    if isinstance(network, Remembering):
        assert network.last == 0.0


class MakesALayer(Counting):
    """Makes a layer with parameters in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.Linear(4, 4)(self.fc(x)) if x.shape[0] else x
        return y


def test_a_layer_made_in_the_forward_is_refused_with_the_fix() -> None:
    with pytest.raises(UntraceableError, match="Make it once, in __init__"):
        prepare(MakesALayer(), example_inputs=torch.randn(2, 4))


def test_a_batch_of_one_is_enough() -> None:
    network = nn.Sequential(BySize(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    prepared = prepare(network, example_inputs=torch.randn(1, 3, 8, 8))
    assert prepared(torch.randn(3, 3, 8, 8)).shape == (3, 2)


def test_a_prepared_network_is_copied() -> None:
    prepared = trained(CASES["attention"])
    a, b = (call(each, CASES["attention"].other).logits for each in (prepared, copy.deepcopy(prepared)))
    assert torch.equal(a, b)


def test_a_file_holds_no_guards(tmp_path: Path) -> None:
    prepared = trained(CASES["size"])
    example = torch.randn(2, 3, 8, 8)
    runtime = load_runtime(export_onnx(prepared, tmp_path / "a.onnx", (example,)))
    torch.testing.assert_close(runtime(example), prepared(example), rtol=0, atol=0.1)


def test_preflight_captures_its_example(case: Case) -> None:
    (report,) = preflight(case.build(), case.example)
    assert report.layers == len([m for m in case.build().modules() if isinstance(m, nn.Linear | nn.Conv2d)])


@pytest.mark.parametrize(
    "example",
    [
        Inputs((torch.randn(2, 3),), {"mask": torch.tensor([True, False]), "n": None}),
        Inputs(({"ids": torch.tensor([[1, 2]]), "x": [torch.ones(1).half()]}, "mean", 0.5), {}),
    ],
)
def test_a_recipe_stores_an_example(example: Inputs) -> None:
    text = store(example)
    assert text is not None
    restored = restore(text)
    assert store(restored) == text
    assert restored.kwargs.keys() == example.kwargs.keys()


def test_an_example_of_other_objects_is_not_stored() -> None:
    assert store(Inputs((object(),), {})) is None
