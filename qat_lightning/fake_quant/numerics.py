"""The arithmetic of int8: computes qparams from a range, and fake-quantizes tensors with gradients.

Everything is computed in float32, whatever the dtype of the input: neither bfloat16 nor float16 can tell the
256 quantized values of a range apart.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from qat_lightning.base.torch_internals import is_view
from qat_lightning.fake_quant.masks import inside_of, masked


def affine_qparams(
    low: torch.Tensor,
    high: torch.Tensor,
    quant_min: int,
    quant_max: int,
    eps: float,
    exact_value: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes a scale and a zero point that cover `[low, high]` and represent 0 exactly.

    Args:
        low: Minimum, of any shape.
        high: Maximum, of the same shape.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        eps: Lower bound of the scale, which gives a tensor of zeros a usable one.
        exact_value: A value to represent exactly, besides 0. The scale grows until this value is a whole
            number of steps, `n`, which takes a factor below `1 + 1 / n`. A scale above the value stays.

    Returns:
        Scale and zero point, in float32 and with the shape of `low`. The zero point is a whole number.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=eps)
    if exact_value is not None:
        scale = torch.where(scale > exact_value, scale, exact_value / (exact_value / scale).floor())
    # The zero point needs no clamp: the scale is at least what the range needs.
    return scale, quant_min - torch.round(low / scale)


def symmetric_scale(magnitude: torch.Tensor, quant_min: int, quant_max: int, eps: float) -> torch.Tensor:
    """Computes the scale of symmetric quantization that covers `[-magnitude, magnitude]`.

    The largest magnitude maps to the last integer (127), so that nothing inside the range is clipped. The
    observers of `torch.ao` map it half a step beyond (127.5).

    Args:
        magnitude: Largest magnitude, of any shape.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        eps: Lower bound of the scale.

    Returns:
        The scale, in float32 and with the shape of `magnitude`.
    """
    return (magnitude / ((quant_max - quant_min) // 2)).clamp(min=eps)


class Kernel(NamedTuple):
    """How the int8 kernels of oneDNN round: they add the zero point first, which loses a float's last bits.

    Attributes:
        averaged: Whether the tensor averages values that are rounded with the same qparams. Many of those lie
            in the middle between two, where a float may be a bit too large or too small.
    """

    averaged: bool = False

    def round_(self, steps: torch.Tensor, zero_point: int) -> torch.Tensor:
        """Rounds a tensor that counts steps of the scale, in place, for the zero point of unsigned bytes."""
        if self.averaged:
            settle_averages_(steps)
        return steps.add_(zero_point).round_().sub_(zero_point) if zero_point else steps.round_()


def settle_averages_(steps: torch.Tensor) -> torch.Tensor:
    """Rounds averages of integers to parts of a step, in place: what is in the middle stays there."""
    return steps.mul_(4096.0).round_().mul_(1 / 4096.0)


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
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Rounds `x` to its quantized values; the gradient passes where nothing is clipped (straight-through).

    Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"; Jacob et al. 2018,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".

    Args:
        x: Tensor of any shape, floating dtype and memory format.
        scale: One element, or one for each index of `axis`.
        zero_point: Integers, as many as scales.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        axis: The channel dimension of per-channel qparams; None for per-tensor qparams.
        extremes: The minimum and the maximum of `x`, if they are known.
        in_place: Whether a float32 `x` may be overwritten. The operation that produced it must not need it
            for its backward pass.
        kernel: How the int8 kernels round, if not as usual; for per-tensor qparams on a CPU.

    Returns:
        A tensor like `x`.
    """
    if axis is not None:
        shape = [1] * x.ndim
        shape[axis] = -1
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    elif x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel():
        # Python numbers select the vectorized kernels, and on the CPU they cost no synchronisation.
        step, zero = float(scale), int(zero_point)
        low, high = extremes if extremes is not None else torch.aminmax(x.detach())
        data_range = float(low), float(high)
        rounds = None if kernel is None else partial(kernel.round_, zero_point=zero - quant_min)
        return _Round.apply(x, step, quant_min - zero, quant_max - zero, data_range, in_place, rounds)
    elif x.is_cuda and not torch.compiler.is_compiling():
        return fake_quantize_in_one_kernel(x, scale, zero_point, quant_min, quant_max)
    else:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return _Round.apply(x, scale, quant_min - zero_point, quant_max - zero_point, None, in_place, None)


def fake_quantize_in_one_kernel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    """Does the per-tensor `fake_quantize` with PyTorch's own kernel: for GPUs.

    On a GPU it does the same arithmetic in one launch and one pass over memory, forward and backward alike.
    On a CPU it is several times slower. It turns a NaN into a number, so that only an observer reveals one.
    """
    step = scale.float()  # the kernel would read the bytes of any other dtype as float32
    return torch.fake_quantize_per_tensor_affine(x.float(), step, zero_point, quant_min, quant_max).to(
        x.dtype
    )


class _Round(torch.autograd.Function):
    """The function `clamp(round(x / scale), low, high) * scale`, with a straight-through gradient.

    It saves one byte for each element for the backward pass, or nothing if no element is clipped.

    A compiled forward returns a copy, since the Dynamo of torch 2.11 gives no gradient to the result of an
    in-place operation. The compiler removes the cost of the copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: Any,
        low: Any,
        high: Any,
        data_range: Any,
        in_place: bool,
        rounds: Any,
    ) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()  # in half precision a bound would be rounded
        inside = inside_of(wide, (low - 0.5) * scale, (high + 0.5) * scale, data_range)
        ctx.save_for_backward(inside)
        compiling = torch.compiler.is_compiling()
        if in_place and x.dtype == torch.float32 and not compiling and not is_view(x):
            ctx.mark_dirty(x)
            return x.mul_(1 / scale).round_().clamp_(low, high).mul_(scale)
        steps = x.float() * (1 / scale)
        rounded = steps.round_() if rounds is None else rounds(steps)
        return rounded.clamp_(low, high).mul_(scale).to(x.dtype, copy=compiling)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad if inside is None else masked(grad, inside), None, None, None, None, None, None


def rectify(x: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """Computes a ReLU that saves one byte for each element for its gradient; torch's saves its result.

    Use it where the result is rounded at once and nothing else keeps it.

    Args:
        x: Tensor of any shape and floating dtype.
        in_place: Whether `x` may be overwritten. The operation that produced it must not need it for its
            backward pass.

    Returns:
        A tensor like `x`.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return torch.relu(x)
    return _Rectify.apply(x, in_place and not is_view(x))


class _Rectify(torch.autograd.Function):
    """The function `max(x, 0)`, which saves a mask of the positive elements."""

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
        return masked(grad, positive), None


def round_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    bounds: tuple[int, int],
    factor: torch.Tensor | None = None,
    *,
    inside: bool = False,
) -> torch.Tensor:
    """Fake-quantizes a weight, times a factor for each output channel, with symmetric per-channel scales.

    Returns the same as `fake_quantize(weight * factor, scale, 0, *bounds, axis=0)`, in fewer passes over
    memory. That matters in deep networks on small images, which hold more weights than activations.

    Args:
        weight: Output channels first.
        scale: One for each output channel.
        bounds: Smallest and largest integer.
        factor: One for each output channel; None for 1.
        inside: Whether the weight is known to lie inside the range, so that nothing is clipped.

    Returns:
        A tensor like `weight`. Gradients reach `weight` and `factor` where nothing is clipped.
    """
    shape = [-1] + [1] * (weight.ndim - 1)
    scale = scale.view(shape)
    factor = None if factor is None else factor.view(shape)
    return _RoundWeight.apply(weight, factor, scale, bounds, inside)


class _RoundWeight(torch.autograd.Function):
    """The function `clamp(round(weight * factor / scale), *bounds) * scale`.

    The backward pass recomputes the mask of the clipped elements.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        factor: torch.Tensor | None,
        scale: torch.Tensor,
        bounds: tuple[int, int],
        inside: bool,
    ) -> torch.Tensor:
        multiplier = scale.reciprocal() if factor is None else factor / scale
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
        factor_grad = (grad * weight).flatten(1).sum(1).view_as(factor) if ctx.needs_input_grad[1] else None
        return grad * factor, factor_grad, None, None, None
