"""Joins the extremes of the tensors that one fake-quantize rounds in one forward.

The parts of a concatenation share a fake-quantize. If each part moved its average on its own, the small ones
would shrink the range, and clip the large ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_Range = tuple[float, float]
_UNSEEN = (torch.inf, -torch.inf)


@dataclass
class _Numbers:
    """The range before a forward and the joined extremes, as numbers."""

    before: _Range
    joined: _Range = _UNSEEN


class ForwardExtremes:
    """The extremes of the calls in one forward, and the range before it.

    Attributes:
        calls: How many calls a forward makes.
    """

    def __init__(self) -> None:
        self.calls = 1
        self._done = 0
        self._before = self._joined = torch.empty(0)
        self._numbers = _Numbers((0.0, 0.0))

    def begin(self) -> None:
        """Begins another forward, even if the last one was broken off."""
        self._done = 0

    def join(
        self, old: torch.Tensor, extremes: torch.Tensor, finite: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Joins the extremes of the next call to those of the forward.

        Args:
            old: The range, as minimum and maximum.
            extremes: The extremes of the tensor, in the same form.
            finite: One bool, whether they are finite.

        Returns:
            The range before the forward, the joined extremes, and whether any of them were finite.
        """
        if self._done == 0:
            self._before, self._joined = old, old.new_tensor([torch.inf, -torch.inf])
        self._done = (self._done + 1) % self.calls
        low, high = torch.minimum(self._joined, extremes)[:1], torch.maximum(self._joined, extremes)[1:]
        self._joined = torch.where(finite, torch.cat((low, high)), self._joined)
        return self._before, self._joined, self._joined[:1] <= self._joined[1:]

    def join_numbers(self, old: _Range, extremes: _Range, finite: bool) -> tuple[_Range, _Range]:
        """Does the same with numbers; the joined extremes are in order if any of them were finite."""
        if self._done == 0:
            self._numbers = _Numbers(old)
        self._done = (self._done + 1) % self.calls
        before, joined = self._numbers.before, self._numbers.joined
        if finite:
            joined = self._numbers.joined = min(joined[0], extremes[0]), max(joined[1], extremes[1])
        return before, joined
