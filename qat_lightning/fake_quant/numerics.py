"""The arithmetic of int8: which grid a range gives, and rounding to it with a gradient.

Everything is float32 whatever the input's dtype, since neither bfloat16 nor float16 can tell 256 grid
points of a range apart.
"""

from __future__ import annotations

from typing import Any

import torch


def affine_grid(
    low: torch.Tensor,
    high: torch.Tensor,
    quant_min: int,
    quant_max: int,
    eps: float,
    unit: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the grid that covers `[low, high]` and holds 0 exactly.

    Args:
        low: Minimum, of any shape.
        high: Maximum, of the same shape.
        quant_min: Least integer of the grid.
        quant_max: Greatest integer of the grid.
        eps: Least scale, so that a constant tensor of zeros has one.
        unit: A number that shall lie on the grid, as 0 does: the scale grows, by less than a step in `unit`,
            until it divides it. Nothing changes where the scale is greater than `unit`.

    Returns:
        Scale and zero point, in float32 and of the shape of `low`. The zero point is a whole number.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=eps)
    if unit is not None:
        scale = torch.where(scale > unit, scale, unit / (unit / scale).floor())
    return scale, quant_min - torch.round(low / scale)  # on the grid: the scale is that of the range, or more


def symmetric_scale(magnitude: torch.Tensor, quant_min: int, quant_max: int, eps: float) -> torch.Tensor:
    """Scale of the symmetric grid that covers `[-magnitude, magnitude]`.

    The greatest magnitude lies on the grid's end (127), not half a step beyond it (127.5) as in
    `torch.ao`'s observers: nothing inside the range is clipped.

    Args:
        magnitude: Greatest magnitude, of any shape.
        quant_min: Least integer of the grid.
        quant_max: Greatest integer of the grid.
        eps: Least scale.

    Returns:
        float32, of the shape of `magnitude`.
    """
    return (magnitude / ((quant_max - quant_min) // 2)).clamp(min=eps)


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    extremes: tuple[torch.Tensor, torch.Tensor] | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """Rounds `x` to a grid; the gradient passes where `x` lies inside it (straight-through estimator).

    Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"; Jacob et al. 2018,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".

    Args:
        x: Tensor of any shape, floating dtype and memory format.
        scale: One element, or one for each index of `axis`.
        zero_point: Likewise, integers.
        quant_min: Least integer of the grid.
        quant_max: Greatest integer of the grid.
        axis: The channel dimension of a per-channel grid; None for one grid for the whole tensor.
        extremes: The minimum and the maximum of `x` where they are known.
        in_place: Whether a float32 `x` may be overwritten: whoever made it must not need it for its gradient.

    Returns:
        A tensor like `x`.
    """
    if axis is not None:
        shape = [1] * x.ndim
        shape[axis] = -1
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    elif x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel():
        # Python numbers take the vectorized kernels, and on the CPU they cost no synchronisation.
        step, zero = float(scale), int(zero_point)
        low, high = extremes if extremes is not None else torch.aminmax(x.detach())
        reach = float(low), float(high)
        return _Round.apply(x, step, quant_min - zero, quant_max - zero, reach, in_place)
    elif x.is_cuda and not torch.compiler.is_compiling():
        return in_one_kernel(x, scale, zero_point, quant_min, quant_max)
    else:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return _Round.apply(x, scale, quant_min - zero_point, quant_max - zero_point, None, in_place)


def in_one_kernel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    """`fake_quantize` with one grid for the whole tensor, by PyTorch's own kernel: for GPUs.

    There it is the same arithmetic in one launch and one pass over memory, each way; on CPUs it is several
    times slower. It makes a number of a NaN, so that only an observer tells of one.
    """
    step = scale.float()  # it would read the bytes of another dtype as a float's
    return torch.fake_quantize_per_tensor_affine(x.float(), step, zero_point, quant_min, quant_max).to(
        x.dtype
    )


class _Round(torch.autograd.Function):
    """`clamp(round(x / scale), low, high) * scale`; a byte saved for each element, none if all are inside.

    A compiled forward returns a copy, which costs nothing once compiled: the Dynamo of torch 2.11 gives no
    gradient to a result that an in-place operation returns.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: Any, low: Any, high: Any, reach: Any, in_place: bool
    ) -> torch.Tensor:
        inside = _inside(x, (low - 0.5) * scale, (high + 0.5) * scale, reach)
        ctx.save_for_backward(inside)
        if in_place and x.dtype == torch.float32 and not torch.compiler.is_compiling():
            ctx.mark_dirty(x)
            return x.mul_(1 / scale).round_().clamp_(low, high).mul_(scale)
        rounded = (x.float() * (1 / scale)).round_()
        return rounded.clamp_(low, high).mul_(scale).to(x.dtype, copy=torch.compiler.is_compiling())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad if inside is None else _masked(grad, inside), None, None, None, None, None


def _inside(x: torch.Tensor, low: Any, high: Any, reach: tuple[float, float] | None) -> torch.Tensor | None:
    """Which elements lie between `low` and `high`; None if all do, as their `reach` tells."""
    if reach is not None:
        above, below = low < reach[0], reach[1] < high
        if above and below:
            return None
        if above or below:
            return x < high if above else x > low
    return (x > low).logical_and_(x < high)


def _masked(grad: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The gradient where the mask is true, else 0; a product of floats is what the CPU does fast."""
    if grad.device.type == "cpu" and not torch.compiler.is_compiling():
        return mask.to(grad.dtype).mul_(grad)
    return torch.where(mask, grad, 0)


def rectify(x: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """ReLU that saves a byte for each element, where torch's saves its result.

    For a result that is rounded at once, and that nobody else keeps.

    Args:
        x: Tensor of any shape and floating dtype.
        in_place: Whether `x` may be overwritten: whoever made it must not need it for its gradient.

    Returns:
        A tensor like `x`.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return torch.relu(x)
    return _Rectify.apply(x, in_place)


class _Rectify(torch.autograd.Function):
    """`max(x, 0)`; saves where the result is not zero."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, in_place: bool) -> torch.Tensor:
        if in_place:
            ctx.mark_dirty(x)
        result = x.relu_() if in_place else x.relu()
        ctx.save_for_backward(result.bool())
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (positive,) = ctx.saved_tensors
        return _masked(grad, positive), None


def round_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    bounds: tuple[int, int],
    factor: torch.Tensor | None = None,
    *,
    inside: bool = False,
) -> torch.Tensor:
    """Rounds a weight, folded with a factor for each output channel, to a symmetric per-channel grid.

    The same as `fake_quantize(weight * factor, scale, 0, *bounds, axis=0)` in fewer passes over memory:
    weights are most of what a deep network with small images has.

    Args:
        weight: Output channels first.
        scale: One for each output channel.
        bounds: Least and greatest integer of the grid.
        factor: What multiplies each channel; None for 1.
        inside: Whether the weight is known to lie inside the grid, so that nothing is clipped.

    Returns:
        A tensor like `weight`. Gradients reach `weight` and `factor` where nothing is clipped.
    """
    shape = [-1] + [1] * (weight.ndim - 1)
    scale = scale.view(shape)
    factor = None if factor is None else factor.view(shape)
    return _RoundWeight.apply(weight, factor, scale, bounds, inside)


class _RoundWeight(torch.autograd.Function):
    """`clamp(round(weight * factor / scale), *bounds) * scale`; the backward makes the mask anew."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        factor: torch.Tensor | None,
        scale: torch.Tensor,
        bounds: tuple[int, int],
        inside: bool,
    ) -> torch.Tensor:
        multiplier = 1 / scale if factor is None else factor / scale
        ctx.save_for_backward(weight, factor, multiplier)
        ctx.bounds = None if inside else bounds
        rounded = (weight.float() * multiplier).round_()
        if not inside:
            rounded.clamp_(*bounds)
        return rounded.mul_(scale).to(weight.dtype, copy=torch.compiler.is_compiling())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, factor, multiplier = ctx.saved_tensors
        if ctx.bounds is not None:
            low, high = ctx.bounds
            grad = torch.ops.aten.hardtanh_backward(grad, weight * multiplier, low - 0.5, high + 0.5)
        if factor is None:
            return grad, None, None, None, None
        of_factor = (grad * weight).flatten(1).sum(1).view_as(factor) if ctx.needs_input_grad[1] else None
        return grad * factor, of_factor, None, None, None
