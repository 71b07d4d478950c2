"""Loads training data in an order, and with an augmentation, that resume exactly, also within an epoch.

There are three parts, each useful alone. `EpochSampler` derives the order from (seed, epoch). `SeededDataset`
derives each sample's random transforms from (seed, epoch, index). `ResumableLoader` remembers how many
batches of the epoch were trained on. None of them reads or changes a global random generator.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU generators inside the block, and restores them after it.

    Args:
        entropy: Integers of at least 0 that together decide the random stream, such as seed, epoch, index.
    """
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields shuffled (epoch, index) pairs in an order that only seed and epoch determine.

    It is a `DistributedSampler` on a single device too, so that Lightning keeps it and calls its `set_epoch`.
    Some samples are repeated if the ranks would otherwise get unequal shares.

    Args:
        dataset: The dataset to sample from. Only its length is used.
        seed: Decides the sequence of permutations. It must be the same on all ranks.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
    """

    def __init__(self, dataset: Sized, *, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.start = 0  # number of samples that the next pass skips at its start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        for index in islice(super().__iter__(), self.start, None):
            yield epoch, index  # type: ignore[misc]


class SeededDataset(Dataset[Any]):
    """Makes the random transforms of a dataset a function of (seed, epoch, index).

    A sample then does not depend on the worker that loads it, or on earlier random numbers.

    Args:
        dataset: A map-style dataset whose `__getitem__` may draw from Python's, NumPy's or torch's
            generator.
        seed: Decides the random numbers.
    """

    def __init__(self, dataset: Dataset[Any], *, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int] | int) -> Any:
        # Samplers without epochs yield plain indices, such as Lightning's sampler for `overfit_batches`.
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with seeded(self.seed, epoch, index):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class ResumableLoader(DataLoader[Any]):
    """A shuffling training loader that Lightning's checkpoints resume at the very next batch.

    Its state is `{"epoch": int, "batches": int}`: an epoch, and how many of its batches this rank has
    yielded. Batches that workers have prefetched do not count. Lightning's fit loop saves and loads the state
    by itself. A resumed run needs the same batch size and the same number of processes.

    Args:
        dataset: A map-style dataset. It may transform its samples at random (see `SeededDataset`).
        batch_size: Samples per batch and process.
        seed: Decides the order in every epoch and the random transforms.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
        sampler: Replaces the `EpochSampler`. The loader then starts every epoch at its beginning.
        **options: Further options of `torch.utils.data.DataLoader`, such as `num_workers` or `drop_last`.

    Example:
        >>> loader = ResumableLoader(list(range(10)), batch_size=4, collate_fn=list)
        >>> first, second, third = loader
        >>> loader.load_state_dict({"epoch": 0, "batches": 2})
        >>> [batch == third for batch in loader]
        [True]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        sampler: Any = None,
        **options: Any,
    ) -> None:
        sampler = sampler or EpochSampler(dataset, seed=seed, num_replicas=num_replicas, rank=rank)
        # With its own generator, the loader does not draw a seed for its workers from the global one.
        options.setdefault("generator", torch.Generator())
        super().__init__(SeededDataset(dataset, seed=seed), batch_size, sampler=sampler, **options)
        self._state = {"epoch": 0, "batches": 0}
        self._resuming = False

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch, and how many of its batches were yielded."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Makes the next pass start after those batches, if it is over the same epoch."""
        self._state = dict(state_dict)
        self._resuming = True

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # This is a generator because Lightning makes the iterator before it sets the epoch.
        if isinstance(self.sampler, EpochSampler):
            self._begin_pass(self.sampler)
        for batch in super().__iter__():
            self._state["batches"] += 1
            yield batch

    def _begin_pass(self, sampler: EpochSampler) -> None:
        continues = self._resuming and self._state["epoch"] == sampler.epoch
        self._resuming = False
        done = self._state["batches"] if continues else 0
        self._state = {"epoch": sampler.epoch, "batches": done}
        sampler.start = done * (self.batch_size or 1)
