"""Checks that the fake-quantizes of all ranks are equal bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed, nn

from qat_lightning.base.errors import RankMismatchError
from qat_lightning.fake_quant.fake_quantize import FakeQuantize, fake_quantizes
from qat_lightning.run.distributed.processes import gather, several_processes


def check_same_qparams(module: nn.Module) -> None:
    """Compares scales, zero points, ranges and switches of all ranks.

    The ranks exchange only a digest. If digests differ, they exchange more to find the first difference.

    Raises:
        RankMismatchError: A fake-quantize differs between ranks. Every rank raises it.
    """
    if not several_processes():
        return
    values = [
        (f"{name} {what}", value)
        for name, fake_quant in fake_quantizes(module)
        for what, value in _values_of(fake_quant)
    ]
    if not values:
        return
    digest = torch.tensor([_digest([value for _, value in values])], device=values[0][1].device)
    digests = [torch.empty_like(digest) for _ in range(distributed.get_world_size())]
    distributed.all_gather(digests, digest)
    if len({int(each) for each in digests}) > 1:
        raise RankMismatchError(f"{_first_difference(values)} {_FIX}")


def _values_of(fake_quant: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the values that must be equal on all ranks. The NaN flag may differ."""
    for name, buffer in fake_quant.named_buffers():
        if name != "nonfinite":
            yield name, buffer.detach()
    if isinstance(fake_quant, FakeQuantize):  # its forward reads these attributes, not the buffers
        yield "switches", torch.tensor([fake_quant.observing, fake_quant.rounding])


def _digest(values: Sequence[Tensor]) -> int:
    """Hashes the bits of `values`, with one transfer per device."""
    found = hashlib.blake2b(digest_size=8)
    for device in dict.fromkeys(value.device for value in values):
        flat = [v.reshape(-1).contiguous().view(torch.uint8) for v in values if v.device == device]
        found.update(torch.cat(flat).cpu().numpy().tobytes())
    return int.from_bytes(found.digest(), "big", signed=True)


def _first_difference(values: Sequence[tuple[str, Tensor]]) -> str:
    """Describes the first difference between ranks. Every rank must call it."""
    names = gather([name for name, _ in values])
    if any(each != names[0] for each in names):
        return "The ranks' networks have different fake-quantizes."
    digests = gather([_digest([value]) for _, value in values])
    index = next(i for i, each in enumerate(zip(*digests, strict=True)) if len(set(each)) > 1)
    other = next(rank for rank, each in enumerate(digests) if each[index] != digests[0][index])
    ranks = gather(values[index][1].flatten().tolist())
    name, _, what = values[index][0].partition(" ")
    ours, theirs = ranks[0], ranks[other]
    if len(ours) == len(theirs) > 1:
        channel = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1), 0)
        what, ours, theirs = f"{what}[{channel}]", ours[channel], theirs[channel]
    return (
        f"The fake-quantize {name!r} is not the same on all ranks: its {what} is {ours!r} on rank 0 and "
        f"{theirs!r} on rank {other}."
    )


_FIX = (
    "All ranks must train with the same qparams, but something changed them on some ranks only. Look for "
    "code that depends on the rank, and switches, loads or overwrites parts of the network."
)
