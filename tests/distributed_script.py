"""Many runs on two gloo processes, one after the other: `distributed_script.py FOLDER`.

Each scenario is a function of the Trainer's folder. A rank writes what it returns, or the error that it
ended with.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed
from torch.ao.quantization import QConfig
from torch.utils.data import DataLoader
from torchvision import models

from qat_lightning import QuantizationAwareTraining
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.modes.qconfig import default_qconfig
from qat_lightning.run import conversion
from qat_lightning.run.distributed.qparams_check import check_same_qparams
from qat_lightning.run.parts import exports
from tests.networks import CLASSES, Residual
from tests.reading import Reading, logits, sentences
from tests.runs import TinyModule, dataset, trainer
from tests.test_ranks import ranges

HISTOGRAMS = QConfig(
    activation=default_qconfig("onednn", "histogram").activation, weight=default_qconfig("onednn").weight
)
Result = dict[str, Any]
SCENARIOS: dict[str, Callable[[Path], Result]] = {}


def scenario(run: Callable[[Path], Result]) -> Callable[[Path], Result]:
    SCENARIOS[run.__name__] = run
    return run


class Uneven(TinyModule):
    """Rank 1 has brighter images, and two images in its last batch, where rank 0 has four."""

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = dataset(16 if self.global_rank == 0 else 14, seed=self.global_rank).tensors
        data = torch.utils.data.TensorDataset(images * 10**self.global_rank, labels)
        return DataLoader(data, batch_size=4)


class Halves(Uneven):
    """Two networks, of which rank 1 never calls the second."""

    def __init__(self) -> None:
        super().__init__()
        self.side = Residual()

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y if self.training and self.global_rank == 1 else y + self.side(x)


def fit(
    folder: Path,
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    qat: QuantizationAwareTraining | None = None,
    ddp: dict[str, Any] | None = None,
    outputs: Callable[[pl.LightningModule], Tensor] = lambda module: module(dataset(8, seed=2).tensors[0]),
    **options: Any,
) -> Result:
    qat = qat or QuantizationAwareTraining(output_dir=folder / "out")
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), **(ddp or {}))
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "use_distributed_sampler": False, **options}
    runner = trainer(folder, qat, *callbacks, strategy=strategy, devices=2, **options)
    runner.fit(module)
    assert qat.int8_module is not None
    return {
        "ranges": ranges(module),
        "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
        "int8": outputs(qat.int8_module),
        "path": None if qat.int8_path is None else str(qat.int8_path),
    }


@contextlib.contextmanager
def fails_on(rank: int, name: str, error: Exception) -> Iterator[None]:
    """Lets a function of the conversion, or of the exports, fail on one rank."""
    fails = distributed.get_rank() == rank
    where = exports if hasattr(exports, name) else conversion
    with mock.patch.object(where, name, side_effect=error) if fails else contextlib.nullcontext():
        yield


@scenario
def uneven(folder: Path) -> Result:
    return fit(folder, Uneven(lr=0.001), accumulate_grad_batches=3, ddp={"gradient_as_bucket_view": True})


@scenario
def static_graph(folder: Path) -> Result:
    return fit(folder, Uneven(lr=0.001), ddp={"static_graph": True})


@scenario
def half_unseen(folder: Path) -> Result:
    return fit(folder, Halves(), limit_val_batches=0, ddp={"find_unused_parameters": True})


@scenario
def histograms(folder: Path) -> Result:
    qat = QuantizationAwareTraining(qconfig=HISTOGRAMS, backend="onednn", output_dir=folder / "out")
    return fit(folder, Uneven(lr=0.001), qat=qat, max_epochs=1)


@scenario
def torchvision(folder: Path) -> Result:
    network = models.resnet18(num_classes=CLASSES)
    return fit(folder, Uneven(network, lr=0.001), max_epochs=1)


class UnevenReading(Reading):
    """The sentences of rank 1 are others than those of rank 0, and padded to other lengths."""

    def train_dataloader(self) -> DataLoader[Any]:
        return sentences(24, seed=self.global_rank)

    def val_dataloader(self) -> DataLoader[Any]:
        return sentences(16, seed=2 + self.global_rank)


@scenario
def captured(folder: Path) -> Result:
    return fit(folder, UnevenReading(), outputs=logits)


class Meddler(pl.Callback):
    """Does something to one fake-quantize of rank 1 after the second batch."""

    def __init__(self, meddle: Callable[[Any], None]) -> None:
        self.meddle = meddle

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            self.meddle(pl_module.get_submodule("model.stem.0.weight_fake_quant"))


@scenario
def switched_off(folder: Path) -> Result:
    return fit(folder, Uneven(), Meddler(lambda grid: grid.enable_fake_quant(False)))


@scenario
def fewer_levels(folder: Path) -> Result:
    return fit(folder, Uneven(), Meddler(lambda grid: setattr(grid, "quant_max", 63)))


@scenario
def one_bit(folder: Path) -> Result:
    module = Uneven(lr=0.001)
    result = fit(folder, module)
    check_same_qparams(module)
    grid: Any = dict(fake_quantizes(module))["model.block.0.weight_fake_quant"]
    if distributed.get_rank() == 1:
        grid.scale[3] = torch.nextafter(grid.scale[3], grid.scale[3] + 1)
    result["scale"] = grid.scale[3].item()
    with mock.patch.object(distributed, "all_gather", wraps=distributed.all_gather) as calls:
        try:
            check_same_qparams(module)
        finally:
            assert calls.call_count == 1
    return result


@scenario
def disk_full(folder: Path) -> Result:
    with fails_on(0, "save_int8", OSError(28, "No space left on device")):
        return fit(folder, Uneven(), max_epochs=1)


@scenario
def rank_1_cannot_take_over(folder: Path) -> Result:
    with fails_on(1, "load_packed", MemoryError("out of memory")):
        return fit(folder, Uneven(), max_epochs=1)


@scenario
def rank_1_cannot_prepare(folder: Path) -> Result:
    keep_float = ["stems"] if distributed.get_rank() == 1 else []
    return fit(folder, Uneven(), qat=QuantizationAwareTraining(keep_float=keep_float))


@scenario
def nan_on_rank_1(folder: Path) -> Result:
    def spoil(grid: Any) -> None:
        grid.nonfinite.fill_(True)

    class Late(Meddler):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.global_rank == 1:
                spoil(pl_module.get_submodule("model.stem.0.weight_fake_quant"))

    return fit(folder, Uneven(), Late(lambda grid: None), limit_val_batches=0)


@scenario
def synchronized_on_the_cpu(folder: Path) -> Result:
    return fit(folder, Uneven(), sync_batchnorm=True)


@scenario
def own_folders(folder: Path) -> Result:
    """Each rank in a folder of its own, and the same relative path in it."""
    rank = distributed.get_rank()
    here = Path.cwd()
    own = folder / f"machine{rank}"
    own.mkdir(parents=True)
    os.chdir(own)
    try:
        return fit(folder, Uneven(), qat=QuantizationAwareTraining(output_dir="out"), max_epochs=1)
    finally:
        os.chdir(here)


@scenario
def own_disks(folder: Path) -> Result:
    """On rank 1 there is a file of that name from another run."""
    real = conversion._identify

    def other(file: Path) -> tuple[str, int, int]:
        name, size, time = real(file)
        return name, size, time + distributed.get_rank()

    with mock.patch.object(conversion, "_identify", other):
        return fit(folder, Uneven(), max_epochs=1)


def main(folder: Path) -> None:
    found: dict[str, Result] = {}
    with contextlib.suppress(MisconfigurationException):
        fit(folder / "start", Uneven(), sync_batchnorm=True)  # starts the processes
    rank = distributed.get_rank()
    for name, run in SCENARIOS.items():
        pl.seed_everything(0, verbose=False)
        try:
            found[name] = run(folder / name)
        except Exception as error:
            found[name] = {"error": type(error).__name__, "message": str(error)}
    torch.save(found, folder / f"rank{rank}.pt")
    # Together, or gloo aborts the process that is still there when the other one leaves.
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
