"""Two gloo processes train a module with layers directly on it: `loose_ddp_script.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from qat_lightning import QuantizationAwareTraining
from tests.networks import sqnr
from tests.runs import dataset, trainer
from tests.test_lightning_modules import Loose


def main(folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    qat = QuantizationAwareTraining(backend="onednn", output_dir=folder / "out")
    module = Loose()
    for _ in range(2):
        runner = trainer(folder, qat, max_epochs=2, strategy="ddp", devices=2)
        runner.fit(module)
    assert isinstance(qat.int8_module, Loose)
    x = dataset(8, seed=2).tensors[0]
    int8 = qat.int8_module(x)
    fake = module.eval()(x)
    result = {"int8": int8, "weight": module.conv.weight.detach(), "sqnr": sqnr(fake, int8)}
    torch.save(result, folder / f"rank{runner.global_rank}.pt")
    # Together, or gloo aborts the process that is still there when the other one leaves.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
