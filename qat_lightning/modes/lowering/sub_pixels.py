"""Writes a transposed convolution as a plain one that computes all pixels of a block as channels.

A transposed convolution with stride `s` makes a block of `s` by `s` pixels for each pixel of its input. Each
pixel of a block is a plain convolution of the input with every `s`-th weight of the kernel, turned around
(Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?"). The sums are the same, so
integers stay exact, and runtimes have int8 kernels for plain convolutions. Where `s` does not divide the
kernel, some weights are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


class SubPixels(NamedTuple):
    """A convolution of images, whose channels become the pixels of blocks, and whose edges are cut off.

    Attributes:
        weight: The weight of the convolution: for each output channel of the transposed one, one for each
            pixel of a block.
        block: Height and width of a block.
        before: How much the convolution pads at the top and at the left.
        after: How much it pads at the bottom and at the right.
        lead: How many pixels of the result to cut off at the top and at the left.
        tail: How many to cut off at the bottom and at the right.
    """

    weight: torch.Tensor
    block: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    lead: tuple[int, ...]
    tail: tuple[int, ...]


class Transposed(NamedTuple):
    """The arguments of `F.conv_transpose2d` after its tensors."""

    stride: Sequence[int]
    padding: Sequence[int]
    output_padding: Sequence[int]
    groups: int
    dilation: Sequence[int]


def sub_pixels(weight: torch.Tensor, how: Transposed, *, even: bool = False) -> SubPixels | None:
    """Returns the plain convolution for a transposed one; None if there is none, or if it would be slower.

    With groups, and above all depthwise, plain int8 convolutions take longer than transposed float ones.

    Args:
        weight: The weight of the transposed convolution of images, of any dtype.
        how: Its other arguments.
        even: Whether the plain one must pad alike on both sides.
    """
    s, kernel = how.stride[0], weight.shape[2:]
    if weight.ndim != 4 or set(how.stride) != {s} or set(how.dilation) != {1} or how.groups > 1:
        return None
    taps = [-(-k // s) for k in kernel]
    before = [t - 1 - p // s for t, p in zip(taps, how.padding, strict=True)]
    if min(before) < 0:
        return None
    sizes = [*zip(kernel, taps, how.padding, how.output_padding, strict=True)]
    # n pixels make (n + before + after - taps + 1) blocks, and the result has (n - 1) * s + span pixels.
    spans = [k - 2 * p + extra for k, _, p, extra in sizes]
    after = [
        max(0, -(-(p % s + span - s) // s) - b + t - 1)
        for span, b, (_, t, p, _) in zip(spans, before, sizes, strict=True)
    ]
    if even:
        before = after = [*map(max, before, after)]
    lead = [p - (t - 1 - b) * s for b, (_, t, p, _) in zip(before, sizes, strict=True)]
    tail = [
        (b + a - t + 2) * s - first - span
        for b, a, t, first, span in zip(before, after, taps, lead, spans, strict=True)
    ]
    return SubPixels(_weight(weight, s, taps), s, *(tuple(each) for each in (before, after, lead, tail)))


def _weight(weight: torch.Tensor, s: int, taps: Sequence[int]) -> torch.Tensor:
    (channels, _, height, width), (down, right) = weight.shape, taps
    padded = F.pad(weight, (0, right * s - width, 0, down * s - height))
    parts = padded.unflatten(3, (right, s)).unflatten(2, (down, s)).flip(2, 4)
    parts = parts.permute(1, 3, 5, 0, 2, 4)  # output, both places in a block, input, both taps
    return parts.reshape(-1, channels, down, right).contiguous()  # oneDNN misreads a weight with gaps


def cut(x: torch.Tensor, how: SubPixels) -> torch.Tensor:
    """Returns the pixels of the blocks, without the edges that are cut off."""
    x = F.pixel_shuffle(x, how.block)
    for dim, (first, last) in enumerate(zip(how.lead, how.tail, strict=True), start=x.ndim - 2):
        x = x.narrow(dim, first, x.shape[dim] - first - last)
    return x
