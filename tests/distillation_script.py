"""The first gradients of two gloo processes that learn from a teacher: `distillation_script.py FOLDER`.

Each process then does its own share alone, with the weights that both began with.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.utils.data import DataLoader, TensorDataset

from tests.runs import TinyModule, dataset
from tests.test_distillation import first_gradients, networks

STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "ddp_find_unused_parameters_true": "ddp_find_unused_parameters_true",
    "static": lambda: DDPStrategy(static_graph=True),
}


class Shared(TinyModule):
    """Of two processes each has its half of the images, whatever the sampler would give it."""

    rank = 0

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = dataset(32).tensors
        return DataLoader(TensorDataset(x[self.rank :: 2], y[self.rank :: 2]), batch_size=8)


def main(folder: Path) -> None:
    options: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False}
    rank = 0
    for name, strategy in STRATEGIES.items():
        student, teacher = networks()
        module = Shared(student)
        Shared.rank = rank  # known from the second strategy on
        made = strategy() if callable(strategy) else strategy
        found, runner = first_gradients(folder, module, teacher, strategy=made, **options)
        if not rank and runner.global_rank:
            rank = Shared.rank = runner.global_rank
        torch.save(found, folder / f"{name}{runner.global_rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
