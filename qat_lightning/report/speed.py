"""Measures the speed of networks in turns, so that other load on the machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from qat_lightning.base.inputs import Inputs
from qat_lightning.base.torch_internals import tree_leaves, tree_map
from qat_lightning.report.content import Speed

BATCHES = (1, 8, 32)
LEAST_ROUNDS, MOST_ROUNDS = 5, 50
_WARM_UPS = 10
_WARM_UP_SHARE = 0.1


class Candidate(NamedTuple):
    """A network to measure.

    Attributes:
        name: As in :class:`qat_lightning.report.content.Speed`.
        runtime: As in `Speed`.
        call: The network, on the CPU in eval mode, or anything that is called like it.
    """

    name: str
    runtime: str
    call: Callable[..., Any]


def measure(
    groups: Sequence[Sequence[Candidate]],
    inputs: Inputs,
    *,
    batches: Sequence[int] = BATCHES,
    threads: int,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
    console: Console | None = None,
) -> list[Speed]:
    """Measures groups of networks, each against the first of its group.

    In each round every network of a group is called once, one after the other.

    Args:
        groups: The networks. The first of each group is its baseline.
        inputs: Arguments that all networks take, of any batch size: the first sample is repeated.
        batches: The batch sizes to measure.
        threads: Threads of PyTorch during the measurement. Other runtimes get their threads when they load a
            file.
        seconds: How long to measure each network at each batch size. It is called at least `LEAST_ROUNDS` and
            at most `MOST_ROUNDS` times.
        clock: Returns the current time in seconds.
        console: Where to show a progress bar; None shows none.

    Returns:
        The speeds, group by group, batch size by batch size, in the order of the group.
    """
    speeds: list[Speed] = []
    bar = Progress(console=console, transient=True, disable=console is None or not console.is_terminal)
    with bar, pinned_threads(threads), torch.inference_mode():
        task = bar.add_task("measuring", total=len(groups) * len(batches))
        for group in groups:
            for batch in batches:
                args, kwargs = of_batch(inputs, batch)
                times = _timed([each.call for each in group], args, kwargs, seconds * len(group), clock)
                speeds += _speeds(group, batch, times)
                bar.advance(task)
    return speeds


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Makes PyTorch use `threads` threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_batch(inputs: Inputs, size: int) -> Inputs:
    """Returns a batch of `size` copies of the first sample of `inputs`.

    The first dimension of the first tensor is the batch size of `inputs`. Tensors with another first
    dimension, such as a mask, and values that are not tensors stay as they are.
    """
    shapes = [v.shape for v in tree_leaves(inputs) if isinstance(v, torch.Tensor) and v.ndim]
    given = shapes[0][0] if shapes else 0

    def repeated(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim or value.shape[0] != given:
            return value
        return value.detach()[:1].repeat(size, *[1] * (value.ndim - 1))

    return Inputs(tree_map(repeated, inputs.args), tree_map(repeated, inputs.kwargs))


def _timed(
    calls: Sequence[Callable[..., Any]], args: Any, kwargs: Any, seconds: float, clock: Callable[[], float]
) -> list[list[float]]:
    """Returns the seconds of each call in each round, after a warm-up."""

    def rounds(least: int, most: int, seconds: float) -> list[list[float]]:
        times: list[list[float]] = []
        start = clock()
        while len(times) < least or (len(times) < most and clock() - start < seconds):
            times.append([])
            for call in calls:
                begun = clock()
                call(*args, **kwargs)
                times[-1].append(clock() - begun)
        return times

    rounds(1, _WARM_UPS, _WARM_UP_SHARE * seconds)
    return rounds(LEAST_ROUNDS, MOST_ROUNDS, seconds)


def _speeds(group: Sequence[Candidate], batch: int, times: list[list[float]]) -> Iterator[Speed]:
    for index, each in enumerate(group):
        durations = [1e3 * round_[index] for round_ in times]
        lower, middle, upper = statistics.quantiles(durations, n=4, method="inclusive")
        ratios = [round_[0] / round_[index] for round_ in times]
        yield Speed(
            name=each.name,
            runtime=each.runtime,
            batch=batch,
            milliseconds=middle,
            spread=(upper - lower) / 2,
            speedup=statistics.median(ratios) if index else None,
        )
