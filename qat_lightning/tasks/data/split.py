"""Splits a labelled dataset into disjoint parts, each with the same share of every class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stratified_split(labels: Sequence[int], fractions: Sequence[float], *, seed: int = 0) -> list[list[int]]:
    """Splits the indices of `labels` at random into parts with equal class shares.

    Args:
        labels: Class of every sample: any integers.
        fractions: Share of each part: each above 0, together at most 1. If they add up to less, the first
            part also gets the rest.
        seed: Decides the split. The same labels, fractions and seed give the same split on every machine.

    Returns:
        One ascending list of indices per fraction. Together the lists hold every index once.

    Raises:
        ValueError: A fraction is not above 0, they add up to more than 1, or a part would be empty.

    Example:
        >>> train, val = stratified_split([0] * 8 + [1] * 4, [0.75, 0.25])
        >>> len(train), len([i for i in val if i < 8]), len([i for i in val if i >= 8])
        (9, 2, 1)
    """
    _check_fractions(fractions)
    parts: list[list[int]] = [[] for _ in fractions]
    rng = np.random.Generator(np.random.PCG64(seed))
    cuts = np.cumsum(fractions[:0:-1])  # shares of all parts but the first, added up from the last part
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(np.asarray(labels) == label))
        pieces = np.split(members, np.rint(cuts * len(members)).astype(int))
        for part, piece in zip(parts, reversed(pieces), strict=True):
            part.extend(piece.tolist())
    if not all(parts):
        raise ValueError(
            f"{len(labels)} samples cannot be split into shares of {list(fractions)}: a part would "
            "be empty. Use more samples or larger fractions."
        )
    return [sorted(part) for part in parts]


def _check_fractions(fractions: Sequence[float]) -> None:
    if min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise ValueError(
            f"Fractions of a split must be above 0 and add up to at most 1, but received {list(fractions)}."
        )
