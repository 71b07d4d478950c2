"""The first gradients of two gloo processes that learn from a teacher: `distillation_script.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from tests.test_distillation import first_gradients, networks
from tests.test_teachers import Shared

STRATEGIES = {"plain": {}, "unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}


def main(folder: Path) -> None:
    for name, options in STRATEGIES.items():
        student, teacher = networks()
        found, runner = first_gradients(
            folder,
            Shared(student),
            teacher,
            strategy=DDPStrategy(**options),  # type: ignore[arg-type]
            devices=2,
            use_distributed_sampler=False,
        )
        torch.save(found, folder / f"{name}{runner.global_rank}.pt")
    # Together, or gloo aborts the process that is still there when the other one leaves.
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
