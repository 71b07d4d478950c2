"""What the callback adds to a step of distributed training, and what a merge of the ranges costs.

    python -m benchmarks.ddp                                  # 1, 2 and 4 gloo processes on the CPU
    python -m benchmarks.ddp --processes 2 --rounds 200 --models resnet18

Steps: in one process group, in turn, a step of each of

- bare: the prepared network under DistributedDataParallel as it is, which broadcasts all buffers at every
  forward;
- bare, observers aside: the same without the buffers that the callback keeps out of the broadcast;
- callback: the LightningModule as Lightning wraps it in a fit with the callback, and the callback's hooks
  around forward, backward and optimizer step.

A step is forward, backward and SGD; Lightning's own loop is in none of them. All ranks wait for each other
before each step, and the ratios are medians of those within a round. The time inside the hooks is also taken
by itself: it moves far less with what else the machine does.

Merges: `merge_ranges` on chains of convolution, batch-norm and ReLU, with the number of collectives and the
bytes that each rank sends in them, which are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import models

from qat_lightning import QuantizationAwareTraining, prepare
from qat_lightning.run.distributed.merge_ranges import keep_out_of_ddp_broadcast, merge_ranges

VARIANTS = ("bare", "bare, observers aside", "callback")
LAYERS = (8, 32, 128)
Batch = tuple[Tensor, Tensor]


class Module(pl.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = getattr(models, name)(num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


class Measure(pl.Callback):
    """Measures at the second batch of a fit, when the preflight is over and the phase entered."""

    def __init__(self, name: str, qat: QuantizationAwareTraining, rounds: int) -> None:
        self.name, self.qat, self.rounds = name, qat, rounds
        self.times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        self.hooks: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx != 1:
            return
        steps = {
            "bare": bare_step(self.name, batch, aside=False),
            "bare, observers aside": bare_step(self.name, batch, aside=True),
            "callback": self.callback_step(trainer, pl_module, batch),
        }
        for index in range(self.rounds + 3):
            for variant in (VARIANTS, VARIANTS[::-1])[index % 2]:
                distributed.barrier()
                start = time.perf_counter()
                steps[variant]()
                if index >= 3:
                    self.times[variant].append(time.perf_counter() - start)
        trainer.should_stop = True

    def callback_step(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> Any:
        wrapped = trainer.strategy.model
        assert isinstance(wrapped, DistributedDataParallel)
        (optimizer,) = trainer.strategy.optimizers

        def step() -> None:
            start = time.perf_counter()
            self.qat.on_train_batch_start(trainer, module, batch, 1)
            before = time.perf_counter() - start
            nn.functional.cross_entropy(wrapped(batch[0]), batch[1]).backward()
            start = time.perf_counter()
            self.qat.on_before_optimizer_step(trainer, module, optimizer)
            self.hooks.append(before + time.perf_counter() - start)
            optimizer.step()
            optimizer.zero_grad()
            start = time.perf_counter()
            self.qat.on_train_batch_end(trainer, module, None, batch, 1)
            self.hooks[-1] += time.perf_counter() - start

        return step


def bare_step(name: str, batch: Batch, *, aside: bool) -> Callable[[], None]:
    network = prepare(Module(name).model).train()
    if aside:
        keep_out_of_ddp_broadcast(network)
    wrapped = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        nn.functional.cross_entropy(wrapped(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_steps(name: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(8 * args.batch, 3, args.size, args.size), torch.randint(10, (8 * args.batch,))
    )
    qat = QuantizationAwareTraining(convert=None, freeze_observers_at=None)
    measure = Measure(name, qat, args.rounds)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=DDPStrategy(process_group_backend="gloo"),
        callbacks=[qat, measure],
        max_epochs=1,
        default_root_dir=folder,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(name), torch.utils.data.DataLoader(data, batch_size=args.batch))
    times = measure.times
    ratios = {
        variant: statistics.median(t / b for t, b in zip(times[variant], times["bare"], strict=True))
        for variant in VARIANTS[1:]
    }
    bare, hooks = statistics.median(times["bare"]), statistics.median(measure.hooks)
    return {"bare_milliseconds": 1e3 * bare, "hooks_milliseconds": 1e3 * hooks, **ratios}


def measure_merge(layers: int, rounds: int) -> dict[str, Any]:
    chain = [
        module
        for _ in range(layers)
        for module in (nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    ]
    network = prepare(nn.Sequential(*chain)).train()
    network(torch.randn(2, 16, 8, 8))
    with collectives() as calls:
        merge_ranges(network)
    found = dict(calls)
    times = []
    for _ in range(rounds):
        distributed.barrier()
        start = time.perf_counter()
        merge_ranges(network)
        times.append(time.perf_counter() - start)
    return {"milliseconds": 1e3 * statistics.median(times), "calls": found.pop("calls", 0), "bytes": found}


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Counts the all-gathers, a merge's only collective, and the bytes that this rank sends with them."""
    found: Counter[str] = Counter()
    real = distributed.all_gather

    def counted(results: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["calls"] += 1
        found[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        return real(results, tensor, *args, **kwargs)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a merge uses all_gather alone")

    others = (
        "all_reduce",
        "broadcast",
        "all_gather_object",
        "broadcast_object_list",
        "all_gather_into_tensor",
    )
    with mock.patch.object(distributed, "all_gather", counted):
        patches = [mock.patch.object(distributed, name, forbidden) for name in others]
        for patch in patches:
            patch.start()
        try:
            yield found
        finally:
            for patch in patches:
                patch.stop()


def worker(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")  # Lightning's advice on tiny data
    torch.set_num_threads(1)
    found: dict[str, Any] = {"steps": {}, "merges": {}}
    with TemporaryDirectory() as folder:
        for name in args.models:
            found["steps"][name] = measure_steps(name, args, Path(folder))
    for layers in LAYERS:
        found["merges"][layers] = measure_merge(layers, args.rounds)
    if distributed.get_rank() == 0:
        args.worker.write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def launch(processes: int, args: argparse.Namespace) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        options = [f"--rounds={args.rounds}", f"--batch={args.batch}", f"--size={args.size}"]
        line = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*line, "-m", "benchmarks.ddp", f"--worker={result}", *options, "--models", *args.models]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], check=True, env=environment, stderr=subprocess.DEVNULL)
        return dict(json.loads(result.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("ddp.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    found = {processes: launch(processes, args) for processes in args.processes}
    args.output.write_text(json.dumps(found, indent=2))
    console = Console()
    console.print(steps_table(found, args))
    console.print(merges_table(found))
    print("All figures:", args.output)


def steps_table(found: dict[int, dict[str, Any]], args: argparse.Namespace) -> Table:
    table = Table(
        title=f"Step time over bare DDP, {args.batch}x3x{args.size}x{args.size} a process, gloo, CPU"
    )
    for column in ("network", "processes", "bare, ms", *VARIANTS[1:], "in hooks, ms", "of bare"):
        table.add_column(column, justify="right")
    for name in args.models:
        for processes, result in found.items():
            row = result["steps"][name]
            bare, hooks = row["bare_milliseconds"], row["hooks_milliseconds"]
            ratios = [f"{row[variant]:.3f}" for variant in VARIANTS[1:]]
            table.add_row(name, str(processes), f"{bare:.0f}", *ratios, f"{hooks:.3f}", f"{hooks / bare:.2%}")
    return table


def merges_table(found: dict[int, dict[str, Any]]) -> Table:
    table = Table(title="A merge: milliseconds, collectives, and bytes that a rank sends")
    for column in ("layers", *(f"{processes} processes" for processes in found)):
        table.add_column(column, justify="right")
    for layers in LAYERS:
        cells = []
        for result in found.values():
            row = result["merges"][str(layers)]
            bytes_sent = " + ".join(str(count) for count in row["bytes"].values()) or "0"
            cells.append(f"{row['milliseconds']:.2f} ms, {row['calls']}, {bytes_sent}")
        table.add_row(str(layers), *cells)
    return table


if __name__ == "__main__":
    main()
