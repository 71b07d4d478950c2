"""On a CPU, ranges and masks are computed in other ways: they are the same, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qat_lightning import FakeQuantize
from qat_lightning.fake_quant import fake_quantize as module
from qat_lightning.fake_quant.masks import inside_of, masked
from qat_lightning.fake_quant.observers import OBSERVERS

BAD = (None, math.nan, math.inf, -math.inf)


def batches(bad: float | None, seed: int) -> list[Tensor]:
    """Tensors of different ranges; the third has an element that is NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(6, generator=generator) * 4 - 2
    found = [torch.randn(4, 3, 5, generator=generator) * 10**size for size in sizes]
    found[1] = found[1].abs()
    if bad is not None:
        found[2][0, 1, 2] = bad
    return found


def state(fake_quantize: FakeQuantize) -> list[Tensor]:
    observer: Any = fake_quantize.activation_post_process
    flags = torch.tensor([fake_quantize.seen, bool(fake_quantize.nonfinite)])
    buffers = (observer.min_val, observer.max_val, fake_quantize.scale, fake_quantize.zero_point)
    return [flags, *(buffer.clone() for buffer in buffers)]


def states(
    monkeypatch: pytest.MonkeyPatch, make: Any, found: list[Tensor], quick: bool
) -> list[list[Tensor]]:
    monkeypatch.setattr(module, "is_eager_on_cpu", lambda x: quick)
    fake_quantize, result = make(), []
    for x in found:
        fake_quantize(x)
        result.append(state(fake_quantize))
    return result


def assert_alike(monkeypatch: pytest.MonkeyPatch, make: Any, found: list[Tensor]) -> None:
    both = zip(*(states(monkeypatch, make, found, quick) for quick in (True, False)), strict=True)
    for one, other in both:
        for left, right in zip(one, other, strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("exact_value", [None, 3.0])
@pytest.mark.parametrize("observer", ["moving_average", "min_max"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_numbers_move_a_range_as_tensors_do(
    monkeypatch: pytest.MonkeyPatch,
    bad: float | None,
    calls: int,
    exact_value: float | None,
    observer: str,
    symmetric: bool,
) -> None:
    def make() -> FakeQuantize:
        qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
        made = FakeQuantize(OBSERVERS[observer], qscheme=qscheme)
        made.exact_value, made.forward_extremes.calls = exact_value, calls
        return made

    for seed in range(5):
        assert_alike(monkeypatch, make, batches(bad, seed))


def test_numbers_average_as_tensors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> FakeQuantize:
        made = FakeQuantize()
        made.average_over(3)
        return made

    assert_alike(monkeypatch, make, batches(None, 0))


def test_a_first_batch_without_a_finite_range_leaves_what_tensors_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_alike(monkeypatch, FakeQuantize, [torch.tensor([math.nan, 1.0]), torch.tensor([2.0, 1.0])])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("allocated", [False, True])
def test_ranges_of_channels_are_set_alike(
    monkeypatch: pytest.MonkeyPatch, bad: float | None, allocated: bool
) -> None:
    def make() -> FakeQuantize:
        options: Any = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
        made = FakeQuantize(OBSERVERS["moving_average_per_channel"], -128, 127, **options)
        if allocated:
            made.allocate(4)
        return made

    assert_alike(monkeypatch, make, batches(bad, 0))


@pytest.mark.parametrize("low", [-2.0, -1.0, -0.5])
@pytest.mark.parametrize("high", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_are_those_of_two_comparisons(low: float, high: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[-1.0, -0.5, -0.25], [0.0, 0.5, 1.0]], dtype=dtype).t()
    expected = (low < x) & (x < high)
    mask = inside_of(x, low, high, (-1.0, 1.0))
    if mask is None:
        assert expected.all()
        return
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)
    grad = torch.arange(6, dtype=dtype).view(2, 3).t()
    assert torch.equal(masked(grad, mask), torch.where(expected, grad, 0))
