"""Training data whose order and augmentation resume exactly, also within an epoch.

Three parts, each useful alone: `EpochSampler` derives the order from (seed, epoch), `SeededDataset`
derives each sample's random transforms from (seed, epoch, index), and `ResumableLoader` remembers
how many batches of the epoch were trained on. Nothing here reads or moves a global random
generator.
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
    """Seeds Python's, NumPy's and torch's CPU generators for the block and restores them after it.

    Args:
        entropy: Integers of at least 0 that together name the random stream, such as seed, epoch,
            index.
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

    It is a `DistributedSampler` also on one device, so that Lightning keeps it as it is and calls
    its `set_epoch`. The last samples are repeated where the ranks would get unequal shares.

    Args:
        dataset: What to sample from; only its length is used.
        seed: Names the sequence of permutations. Has to be the same on all ranks.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
    """

    def __init__(self, dataset: Sized, *, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.start = 0  # samples that the next pass leaves out at its beginning

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        for index in islice(super().__iter__(), self.start, None):
            yield epoch, index  # type: ignore[misc]


class SeededDataset(Dataset[Any]):
    """Makes the random transforms of a dataset a function of (seed, epoch, index).

    So a sample is the same whichever worker loads it and whatever was drawn before.

    Args:
        dataset: A map-style dataset whose `__getitem__` may draw from Python's, NumPy's or torch's
            generator.
        seed: Names the sequence of draws.
    """

    def __init__(self, dataset: Dataset[Any], *, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int] | int) -> Any:
        # Plain indices come from samplers that know no epochs, such as Lightning's for
        # `overfit_batches`.
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with seeded(self.seed, epoch, index):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class ResumableLoader(DataLoader[Any]):
    """A shuffling training loader that Lightning's checkpoints resume at the very next batch.

    Its state is `{"epoch": int, "batches": int}`: the batches of that epoch that were handed out,
    per rank. Batches that workers have prefetched are not counted. Lightning's fit loop saves and
    loads the state by itself; resuming needs the same batch size and number of processes.

    Args:
        dataset: A map-style dataset, which may transform its samples at random (see
            `SeededDataset`).
        batch_size: Samples per batch and process.
        seed: Names the order of all epochs and the random transforms.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
        sampler: Takes the place of `EpochSampler`. The loader then starts every epoch at its
            beginning.
        **options: Further options of `torch.utils.data.DataLoader`, such as `num_workers` or
            `drop_last`.

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
        # With its own generator, an iteration draws no worker seed from the global one.
        options.setdefault("generator", torch.Generator())
        super().__init__(SeededDataset(dataset, seed=seed), batch_size, sampler=sampler, **options)
        self._state = {"epoch": 0, "batches": 0}
        self._resuming = False

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch and how many of its batches were handed out."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Makes the next pass, if it is over the same epoch, continue after those batches."""
        self._state = dict(state_dict)
        self._resuming = True

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, because Lightning makes the iterator before it sets the epoch.
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
