"""The numerics of fake-quantization against a plain float64 reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver

from qat_lightning import FakeQuantize
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.fake_quant.numerics import (
    affine_qparams,
    fake_quantize,
    fake_quantize_in_one_kernel,
    round_weight,
)
from qat_lightning.fake_quant.observers import OBSERVERS
from qat_lightning.modes.qconfig import default_qconfig

GRIDS = st.sampled_from([(0, 127), (0, 255), (-128, 127)])
SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=5)


def reference(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """What rounding to a grid means, in float64."""
    integers = torch.round(x.double() / scale) + zero_point
    return (integers.clamp(low, high) - zero_point) * scale


@pytest.mark.parametrize("function", [fake_quantize, fake_quantize_in_one_kernel])
@settings(max_examples=150, deadline=None)
@given(
    shape=SHAPES,
    grid=GRIDS,
    scale=st.floats(1e-6, 1e3),
    position=st.floats(0, 1),
    spread=st.floats(0.01, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_forward_rounds_to_the_nearest_point_of_the_grid(
    function: Any,
    shape: list[int],
    grid: tuple[int, int],
    scale: float,
    position: float,
    spread: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    low, high = grid
    zero_point = low + round(position * (high - low))
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale * spread).to(dtype)
    scale_, zero_ = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
    y = function(x, scale_, zero_, low, high)

    assert y.shape == x.shape
    assert y.dtype == x.dtype
    step = float(scale_)
    near_tie = ((x.double() / step).frac().abs() - 0.5).abs() < 1e-3  # float32 may round either way
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
    expected = reference(x, step, zero_point, low, high)
    finite = torch.isfinite(x)
    spacing = 2**-24 if dtype == torch.float16 else 1e-12  # float16's least numbers lie that far apart
    torch.testing.assert_close(
        y.double()[finite & ~near_tie], expected[finite & ~near_tie], rtol=tolerance, atol=spacing
    )


@pytest.mark.parametrize("function", [fake_quantize, fake_quantize_in_one_kernel])
@settings(max_examples=100, deadline=None)
@given(grid=GRIDS, position=st.floats(0, 1), seed=st.integers(0, 1000))
def test_gradient_is_the_straight_through_estimators(
    function: Any, grid: tuple[int, int], position: float, seed: int
) -> None:
    low, high = grid
    zero_point = low + round(position * (high - low))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, generator=generator) * 100
    grad = torch.randn(200, generator=generator)
    x.requires_grad_()
    zero = torch.tensor([zero_point], dtype=torch.int32)
    function(x, torch.tensor([0.7]), zero, low, high).backward(grad)

    integers = torch.round(x.detach().double() / 0.7) + zero_point
    inside = (integers >= low) & (integers <= high)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(inside, grad, 0))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    folded=st.booleans(),
    spread=st.floats(0.5, 4),
    seed=st.integers(0, 1000),
)
def test_round_weight_is_fake_quantize_of_the_folded_weight(
    shape: list[int], folded: bool, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).float()
    factor = torch.randn(shape[0], generator=generator) if folded else None
    scale = torch.rand(shape[0], generator=generator) * spread / 127 + 1e-4
    grad = torch.randn(shape, generator=generator)
    plain, fast = (weight.clone().requires_grad_() for _ in range(2))
    factors = [None if factor is None else factor.clone().requires_grad_() for _ in range(2)]

    column = [-1] + [1] * (len(shape) - 1)
    product = plain if factors[0] is None else plain * factors[0].view(column)
    zero = torch.zeros(shape[0], dtype=torch.int32)
    slow = fake_quantize(product, scale, zero, -128, 127, axis=0)
    slow.backward(grad)
    quick = round_weight(fast, scale, (-128, 127), factors[1])
    quick.backward(grad)

    position = (product.detach() / scale.view(column)).abs()
    tie = ((position.frac() - 0.5).abs() < 1e-3) | ((position - 127.5).abs() < 1)
    torch.testing.assert_close(quick[~tie], slow[~tie])
    assert plain.grad is not None
    assert fast.grad is not None
    torch.testing.assert_close(fast.grad[~tie], plain.grad[~tie])
    if factors[0] is not None and factors[1] is not None and not tie.any():
        torch.testing.assert_close(factors[1].grad, factors[0].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [fake_quantize, fake_quantize_in_one_kernel])
def test_a_network_in_float64_has_the_same_grid(function: Any) -> None:
    x, zero = torch.randn(100), torch.tensor([100], dtype=torch.int32)
    y = function(x, torch.tensor([0.03]), zero, 0, 255)
    in_float64 = function(x.double(), torch.tensor([0.03]).double(), zero, 0, 255)
    assert in_float64.dtype == torch.float64
    torch.testing.assert_close(in_float64.float(), y)


def test_a_weight_inside_its_grid_gets_every_gradient() -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    weight_grid()(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_per_channel_rounds_each_channel_to_its_own_grid(memory_format: torch.memory_format) -> None:
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=memory_format)
    scale = torch.tensor([0.01, 0.1, 1.0])
    y = fake_quantize(x, scale, torch.zeros(3, dtype=torch.int32), -128, 127, axis=1)
    for c in range(3):
        expected = reference(x[:, c], float(scale[c]), 0, -128, 127).float()
        torch.testing.assert_close(y[:, c], expected, rtol=1e-6, atol=1e-6)
    assert y.is_contiguous(memory_format=memory_format)


@settings(max_examples=100, deadline=None)
@given(low=st.floats(-1e6, 1e6), width=st.floats(0, 1e6), grid=GRIDS)
def test_affine_qparams_cover_the_range_and_represent_zero(
    low: float, width: float, grid: tuple[int, int]
) -> None:
    quant_min, quant_max = grid
    scale, zero_point = affine_qparams(
        torch.tensor([low]), torch.tensor([low + width]), quant_min, quant_max, 1e-7
    )
    step, zero = float(scale), int(zero_point)
    assert quant_min <= zero <= quant_max  # zero is a point of the grid
    assert (quant_min - zero) * step <= min(low, 0) + 0.5001 * step
    assert (quant_max - zero) * step >= max(low + width, 0) - 0.5001 * step


@pytest.mark.parametrize(
    ("dtype", "grid", "zero"), [(torch.qint8, (-128, 127), 0), (torch.quint8, (0, 255), 128)]
)
def test_symmetric_grid_ends_at_the_greatest_magnitude(
    dtype: torch.dtype, grid: tuple[int, int], zero: int
) -> None:
    options: dict[str, Any] = {"qscheme": torch.per_channel_symmetric, "ch_axis": 0, "dtype": dtype}
    of_channels = FakeQuantize(OBSERVERS["min_max_per_channel"], *grid, **options)
    of_channels(torch.tensor([[-2.54, 1.0], [0.0, 1.27]]))
    options = {"qscheme": torch.per_tensor_symmetric, "dtype": dtype}
    of_all = FakeQuantize(OBSERVERS["min_max"], *grid, **options)
    of_all(torch.tensor([-2.54, 1.0]))
    assert of_channels.scale.tolist() == pytest.approx([0.02, 0.01])
    assert of_all.scale.tolist() == pytest.approx([0.02])
    assert of_channels.zero_point.tolist() == [zero] * 2
    assert of_all.zero_point.tolist() == [zero]


def weight_grid() -> Any:
    return default_qconfig("onednn").weight()


def activation_grid(backend: str = "onednn", observer: str = "moving_average") -> Any:
    return default_qconfig(backend, observer).activation()


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_tensors_keep_their_value(value: float) -> None:
    x = torch.full((2, 3), value)
    torch.testing.assert_close(activation_grid()(x), x, rtol=1e-3, atol=0)
    torch.testing.assert_close(weight_grid()(x), x, rtol=1e-6, atol=0)


def test_an_all_zero_channel_stays_zero_beside_others() -> None:
    weight = torch.randn(4, 2, 3, 3)
    weight[1] = 0
    rounded = weight_grid()(weight)
    assert torch.equal(rounded[1], weight[1])
    assert torch.isfinite(rounded).all()


def test_empty_and_scalar_tensors_pass() -> None:
    grid = activation_grid()
    assert grid(torch.empty(0, 3)).shape == (0, 3)
    assert math.isinf(grid.activation_post_process.min_val)
    assert float(grid(torch.tensor(2.0))) == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("observer", ["moving_average", "min_max", "histogram"])
def test_nonfinite_values_never_enter_the_range_and_set_the_flag(observer: str, bad: float) -> None:
    grid = activation_grid(observer=observer)
    grid(torch.randn(100))
    before = [v.clone() for v in (grid.scale, grid.zero_point)]
    assert not grid.nonfinite
    grid(torch.tensor([0.5, bad, -0.5]))
    assert grid.nonfinite
    assert [torch.equal(a, b) for a, b in zip(before, (grid.scale, grid.zero_point), strict=True)] == [
        True
    ] * 2
    grid(torch.randn(100))
    assert grid.nonfinite  # sticky


def test_first_nonfinite_tensor_leaves_no_range() -> None:
    grid = activation_grid()
    grid(torch.tensor([math.nan]))
    assert math.isinf(grid.activation_post_process.min_val)
    grid(torch.tensor([-1.0, 1.0]))
    assert float(grid.activation_post_process.max_val) == 1.0


@pytest.mark.parametrize(
    ("observer", "kind"), [("moving_average", MovingAverageMinMaxObserver), ("min_max", MinMaxObserver)]
)
def test_range_follows_torchs_own_observer(observer: str, kind: Any) -> None:
    grid, torchs = activation_grid(observer=observer), kind(dtype=torch.quint8)
    for scale in (1.0, 3.0, 0.5):
        x = torch.randn(50) * scale
        grid(x)
        torchs(x)
    ours = grid.activation_post_process
    torch.testing.assert_close(ours.min_val, torchs.min_val.reshape(ours.min_val.shape))
    torch.testing.assert_close(ours.max_val, torchs.max_val.reshape(ours.max_val.shape))
    scale, zero_point = torchs.calculate_qparams()
    assert torch.equal(grid.scale, scale)
    assert torch.equal(grid.zero_point, zero_point)


def test_forward_rounds_with_what_convert_reads_in_every_phase() -> None:
    grid = activation_grid()
    x = torch.randn(1000)
    for phase in ("observing", "frozen", "eval"):
        if phase == "frozen":
            grid.disable_observer()
        if phase == "eval":
            grid.eval()
        y = grid(x * 2)
        scale, zero_point = grid.calculate_qparams()
        with quiet_torch_ao():
            int8 = torch.quantize_per_tensor(x * 2, float(scale), int(zero_point), torch.quint8)
        assert torch.equal(y, int8.dequantize())


def test_frozen_means_frozen_and_evaluation_moves_nothing() -> None:
    grid = activation_grid()
    grid(torch.randn(10))
    state = {name: value.clone() for name, value in grid.state_dict().items()}
    grid.eval()
    grid(torch.randn(10) * 100)
    grid.train().disable_observer()
    state["observer_enabled"] = grid.observer_enabled.clone()
    grid(torch.randn(10) * 100)
    assert all(torch.equal(value, state[name]) for name, value in grid.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_ranges_and_rounding_are_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 10_001).to(dtype)
    grid = activation_grid()
    with torch.autocast("cpu", dtype=dtype):
        y = grid(x)
    assert y.dtype == dtype
    assert grid.scale.dtype == torch.float32
    scale, zero_point = float(grid.scale), int(grid.zero_point)
    tie = ((x.double() / scale).frac().abs() - 0.5).abs() < 1e-3
    exact = reference(x, scale, zero_point, 0, 255).to(dtype)
    assert torch.equal(y[~tie], exact[~tie])


def test_state_dict_round_trip() -> None:
    for make in (activation_grid, weight_grid):
        grid, fresh = make(), make()
        x = torch.randn(4, 3, 2, 2)
        grid(x)
        grid.disable_observer()
        fresh.load_state_dict(grid.state_dict())
        assert not fresh.observing
        assert fresh.rounding
        y = torch.randn(4, 3, 2, 2) * 5
        assert torch.equal(fresh(y), grid(y))


@pytest.mark.parametrize("make", [activation_grid, weight_grid])
def test_compiles_as_one_graph(make: Any) -> None:
    eager, compiled = make(), make()
    if compiled.axis is not None:
        compiled.allocate(4)  # as `prepare` does
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 3, 2, 2)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        left, right = eager(a), function(b)
        torch.testing.assert_close(left, right)
        left.sum().backward()
        right.sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert torch.equal(eager.scale, compiled.scale)


def test_observer_names_are_checked() -> None:
    with pytest.raises(ValueError, match="observer must be one of"):
        default_qconfig("x86", "median")


def test_extreme_values_saturate() -> None:
    grid = activation_grid()
    grid(torch.tensor([-1.0, 1.0]))
    grid.disable_observer()
    low, high = grid(torch.tensor([-3e38, 3e38]))
    step, zero = float(grid.scale), int(grid.zero_point)
    np.testing.assert_allclose([low.item(), high.item()], [-zero * step, (255 - zero) * step], rtol=1e-6)


def test_seven_bits_for_x86_and_fbgemm_eight_for_the_others() -> None:
    grids = {b: activation_grid(b) for b in ("x86", "fbgemm", "qnnpack", "onednn")}
    assert {b: g.quant_max for b, g in grids.items()} == {
        "x86": 127,
        "fbgemm": 127,
        "qnnpack": 255,
        "onednn": 255,
    }
    assert all(isinstance(g, FakeQuantize) for g in grids.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("data_range", [False, True])
def test_the_gradient_of_half_precision_is_that_of_the_same_numbers_in_float32(
    dtype: torch.dtype, data_range: bool
) -> None:
    torch.manual_seed(0)
    numbers = (2 * torch.randn(64, 64)).to(dtype)
    scale, zero_point = torch.tensor([0.02]), torch.tensor([128])
    extremes = numbers.float().aminmax() if data_range else None
    gradients = []
    for x in (numbers.clone().requires_grad_(), numbers.float().requires_grad_()):
        y = fake_quantize(x, scale, zero_point, 0, 255, extremes=extremes)
        y.sum().backward()
        assert x.grad is not None
        gradients.append(x.grad.float())
    assert torch.equal(*gradients)
    assert 0 < int((gradients[0] == 0).sum()) < numbers.numel()
