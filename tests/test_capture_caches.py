"""Caches: what a forward keeps for its next call makes no difference, whatever an earlier run left in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import UntraceableError, convert, load_int8, prepare, save_int8
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.quantize.recipe import recipe_of


class Cached(nn.Module):
    """Adds one row for each position, which the subclasses cache."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def rows(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], device=x.device)[:, None] / 8.0 + torch.zeros(4)

    def cached(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)) * self.cached(x))
        return y


class ByShape(Cached):
    """Compares a shape that a class's default lacks, as ultralytics' heads do."""

    shape: Any = None
    kept: Any = torch.empty(0)

    def cached(self, x: Tensor) -> Tensor:
        if self.shape != x.shape:
            self.kept, self.shape = self.rows(x), x.shape
        return self.kept


class InABuffer(Cached):
    """Reads the size from the cache itself, a buffer, as timm's ConViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1, 1), persistent=False)

    def cached(self, x: Tensor) -> Tensor:
        self.kept: Any
        if self.kept is None or self.kept.shape[0] != x.shape[1]:
            self.kept = self.rows(x)
        return self.kept


class WithoutNone(Cached):
    """Reads the size from the cache itself, which is always a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(1, 1)

    def cached(self, x: Tensor) -> Tensor:
        if self.kept.shape[0] != x.shape[1]:
            self.kept = self.rows(x)
        return self.kept


class Growing(Cached):
    """Keeps the longest table so far in a buffer that it registers, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.set_table(torch.zeros(1, 2, 4))

    def set_table(self, x: Tensor) -> None:
        self.length = x.shape[1]
        self.register_buffer("kept", self.rows(x), persistent=False)

    def cached(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.length:
            self.set_table(x)
        self.kept: Any
        kept: Tensor = self.kept[: x.shape[1]]
        return kept


class WithAttribute(Cached):
    """Makes the attribute at the first call."""

    kept: Tensor

    def cached(self, x: Tensor) -> Tensor:
        if not hasattr(self, "kept") or self.kept.shape[0] != x.shape[1]:
            self.kept = self.rows(x)
        return self.kept


class ByAPart(Cached):
    """Compares a part of a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.size: Any = 0, 0
        self.kept: Any = None

    def cached(self, x: Tensor) -> Tensor:
        if self.size[1] != x.shape[1]:
            self.kept, self.size = self.rows(x), x.shape[:2]
        kept: Tensor = self.kept
        return kept


CACHES = [ByShape, InABuffer, WithoutNone, Growing, WithAttribute, ByAPart]
EXAMPLE, OTHER = torch.randn(2, 6, 4), torch.randn(3, 5, 4)


def after(network: Cached, x: Tensor | None) -> Cached:
    """A copy of a network, in training mode, that has run on `x`."""
    network = copy.deepcopy(network).eval()
    if x is not None:
        network(x)
    return network.train()


@pytest.mark.parametrize("build", CACHES)
@pytest.mark.parametrize("last", [None, EXAMPLE, OTHER], ids=["fresh", "fitting", "other"])
def test_the_graph_computes_a_cache_anew(build: type[Cached], last: Tensor | None, tmp_path: Path) -> None:
    fresh = build()
    prepared = prepare(after(fresh, last), example_inputs=EXAMPLE)
    set_enabled(prepared, observer=False, fake_quant=False)
    for x in (EXAMPLE, OTHER, EXAMPLE):
        torch.testing.assert_close(prepared(x), copy.deepcopy(fresh)(x))
    set_enabled(prepared, observer=True, fake_quant=True)
    prepared(EXAMPLE)
    int8 = convert(prepared.eval())
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), fresh)
    for x in (EXAMPLE, OTHER):
        assert torch.equal(loaded(x), int8(x))


@pytest.mark.parametrize("build", CACHES)
def test_an_earlier_run_does_not_change_the_graph(build: type[Cached]) -> None:
    fresh = build()
    codes = {prepare(after(fresh, last), example_inputs=EXAMPLE).code for last in (None, EXAMPLE, OTHER)}
    assert len(codes) == 1


@pytest.mark.parametrize("build", CACHES)
@pytest.mark.parametrize("last", [None, EXAMPLE], ids=["fresh", "fitting"])
def test_a_capture_leaves_a_cache_as_it_was(build: type[Cached], last: Tensor | None) -> None:
    network = after(build(), last)
    before = {**vars(network)}, dict(network.named_buffers())
    prepare(network, example_inputs=EXAMPLE)
    assert vars(network) == before[0]
    assert all(value is before[1][name] for name, value in network.named_buffers())


class Initialized(Cached):
    """Takes its scale from its first input, and keeps it: no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = None

    def cached(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = 1 / x.detach().std(dim=(0, 1))
        scale: Tensor = self.scale
        return scale


def test_what_the_first_input_decided_is_kept() -> None:
    network = after(Initialized(), torch.randn(9, 6, 4) * 3)
    prepared = prepare(copy.deepcopy(network), example_inputs=EXAMPLE)
    set_enabled(prepared, observer=False, fake_quant=False)
    for x in (EXAMPLE, OTHER):
        torch.testing.assert_close(prepared(x), network(x))


class Averaging(Cached):
    """Keeps a running mean in training."""

    mean: Any

    def __init__(self, mean: Tensor | None) -> None:
        super().__init__()
        if mean is None:
            self.register_buffer("mean", torch.ones(4), persistent=False)
        else:
            self.mean = mean

    def cached(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
            return x
        return x - self.mean


class Handing(Cached):
    """Keeps in training what it reads in eval mode."""

    mean: Any = 0.0

    def cached(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = x.mean((0, 1))
            return x
        return x - self.mean


class Remembering(Cached):
    """Reads in training what its last call stored."""

    last: Any = None

    def cached(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        last = x if self.last is None else self.last
        self.last = 2 * x
        y: Tensor = x + last
        return y


class Replacing(Cached):
    """Keeps something of its last input in a buffer of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def cached(self, x: Tensor) -> Tensor:
        self.mean: Any = x.mean((0, 1))
        return x


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Averaging(torch.ones(4)), "stores 'mean', in training mode, on which eval mode depends"),
        (Averaging(None), "stores 'mean', in training mode, on which eval mode depends"),
        (Handing(), "stores 'mean', in training mode, on which eval mode depends"),
        (Remembering(), "stores 'last', on which its next call depends"),
        (Replacing(), "writes to the buffer 'mean'"),
    ],
)
def test_statistics_are_no_cache(network: nn.Module, message: str) -> None:
    with pytest.raises(UntraceableError, match=message):
        prepare(network, example_inputs=EXAMPLE)


def test_a_convit_is_captured_with_all_of_its_layers(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    def build() -> nn.Module:
        made: nn.Module = timm.create_model(
            "convit_tiny", img_size=32, embed_dim=16, depth=2, num_heads=4, local_up_to_layer=1
        )
        return made

    images, more = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 32)
    network = build().eval()
    network(images)
    layers = {name for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    prepared = prepare(copy.deepcopy(network), example_inputs=images)
    recipe = recipe_of(prepared)
    assert recipe is not None
    assert set(recipe.layers) == layers
    prepared(images)
    int8 = convert(prepared.eval())
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), build())
    assert torch.equal(loaded(more), int8(more))
    set_enabled(prepared, observer=False, fake_quant=False)
    torch.testing.assert_close(prepared(more), network(more), rtol=1e-3, atol=1e-4)
