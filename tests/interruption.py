"""Runs of `qat-train` that are killed at a chosen or a random moment, and what they end with.

A run is a forked copy of this process, in which torch is imported already, so that hundreds of runs take
minutes. Two processes are started as `torchrun` starts them: each a fork, with torchrun's variables.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileOpener  # type: ignore[import-untyped]
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import qat_lightning.conversion
import qat_lightning.files
import qat_lightning.train
from qat_lightning import load_int8
from qat_lightning.classifier import ImageClassifier
from qat_lightning.models import DigitsCNN
from tests.networks import same_state

TIMEOUT = 120
SETTINGS = (
    "experiment=digits_demo",
    "model.width=8",
    "data.batch_size=32",
    "optimizer.lr=0.1",
    "trainer.max_epochs=3",
    "+trainer.limit_train_batches=5",
    "+trainer.limit_val_batches=2",
    "+trainer.limit_test_batches=2",
    "quantization.freeze_observers_at=1",
    "quantization.freeze_bn_at=2",
)
IN_MID_EPOCH = "callbacks.last.every_n_train_steps=2"
DDP = ("trainer=ddp_cpu",)


@dataclass(frozen=True)
class Call:
    """The moment of a call, counted from 1, of a function of a module or class.

    Attributes:
        owner: The module or class.
        name: The function in it.
        count: Which call.
        after: Whether the moment is after the call has done its work, or before.
    """

    owner: Any
    name: str
    count: int = 1
    after: bool = False

    def arm(self, act: Callable[[], None]) -> None:
        """Puts a function in place that calls `act` at the moment."""
        original = getattr(self.owner, self.name)
        calls = 0

        def replaced(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.count and not self.after:
                act()
            result = original(*args, **kwargs)
            if calls == self.count and self.after:
                act()
            return result

        setattr(self.owner, self.name, replaced)


@dataclass(frozen=True)
class HalfCheckpoint:
    """The moment when half of a checkpoint lies in its place, as where it is copied from another file system.

    Attributes:
        count: Which checkpoint, counted from 1.
    """

    count: int

    def arm(self, act: Callable[[], None]) -> None:
        """Makes the commit of that file write half of it and call `act`."""
        original, calls = LocalFileOpener.commit, 0

        def half(opener: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == self.count:
                content = Path(opener.temp).read_bytes()
                Path(opener.path).write_bytes(content[: len(content) // 2])
                act()
            original(opener)

        LocalFileOpener.commit = half  # type: ignore[method-assign]


Moment = Call | HalfCheckpoint
TRAIN = qat_lightning.train

MOMENTS: dict[str, Moment] = {
    "the first step": Call(ImageClassifier, "training_step", 1),
    "a step in mid-epoch": Call(ImageClassifier, "training_step", 9),
    "the first step with frozen observers": Call(ImageClassifier, "training_step", 6),
    "after the first step with frozen batch-norm": Call(ImageClassifier, "training_step", 11, after=True),
    "an optimizer step": Call(torch.optim.SGD, "step", 8),
    "the last step": Call(ImageClassifier, "training_step", 15),
    "a validation": Call(ImageClassifier, "validation_step", 6),
    "the last validation": Call(ImageClassifier, "validation_step", 8),
    "torch.save of a checkpoint": Call(torch, "save", 6),
    "before the last checkpoint is in place": Call(LocalFileOpener, "commit", 5),
    "after a checkpoint is in place": Call(LocalFileOpener, "commit", 3, after=True),
    "half a checkpoint": HalfCheckpoint(2),
    "half a later checkpoint": HalfCheckpoint(4),
    "half the last checkpoint": HalfCheckpoint(5),
    "the conversion": Call(qat_lightning.conversion, "convert"),
    "after the conversion": Call(qat_lightning.conversion, "convert", after=True),
    "writing the int8 file": Call(qat_lightning.conversion, "save_int8"),
    "before the int8 file is in place": Call(Path, "replace", 2),
    "after the int8 file is in place": Call(Path, "replace", 2, after=True),
    "scoring the int8 network": Call(TRAIN, "evaluate", 2),
    "writing metrics.json": Call(Path, "replace", 3),
    "after metrics.json is in place": Call(Path, "replace", 3, after=True),
}


def start(folder: Path, overrides: Sequence[str], *, ranks: int = 1, arm: Any = None) -> list[int]:
    """Starts `qat-train` in `folder`, and returns the numbers of its processes.

    Args:
        folder: Working folder of the command.
        overrides: Its arguments.
        ranks: Processes of the run.
        arm: Called in each process with its rank, before the command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = ["+callbacks.final._target_=tests.interruption.FinalState", f"+callbacks.final.folder={folder}"]
    port = _free_port()
    return [_fork(folder, [*overrides, *probe], rank, ranks, port, arm) for rank in range(ranks)]


def _fork(folder: Path, overrides: Sequence[str], rank: int, ranks: int, port: int, arm: Any) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        sys.stdout = sys.stderr = (folder / f"output{rank}.txt").open("a", buffering=1)
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        os.chdir(folder)
        if ranks > 1:
            os.environ |= _rank_variables(rank, ranks, port)
            rank_zero_only.rank = rank  # type: ignore[attr-defined]
        sys.argv = ["qat-train", *overrides]
        if arm is not None:
            arm(rank)
        qat_lightning.train.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(processes: Sequence[int], timeout: float = TIMEOUT) -> list[int]:
    """Waits for processes and returns their exit codes; what is left when one has died is killed too."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    codes[process] = os.waitstatus_to_exitcode(status)
        failed = any(code != 0 for code in codes.values())
        if time.monotonic() > end or (failed and len(codes) < len(processes)):
            # As torchrun's agent does it, which gives the others no more time than that to notice.
            time.sleep(1.0 if failed else 0.0)
            kill([p for p in processes if p not in codes])
        time.sleep(0.01)
    if time.monotonic() > end:
        raise TimeoutError(f"A run took more than {timeout} s.")
    return [codes[process] for process in processes]


def kill(processes: Sequence[int]) -> None:
    """Kills processes that the caller has not waited for yet."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def kill_oneself() -> None:
    """The end of a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(
    folder: Path,
    *overrides: str,
    ranks: int = 1,
    at: Moment | None = None,
    rank: int = 0,
    act: Callable[[], None] = kill_oneself,
) -> list[int]:
    """Runs `qat-train` in `folder` and returns the exit codes of its processes.

    Args:
        folder: Working folder of the command.
        overrides: Its arguments.
        ranks: Processes of the run.
        at: A moment at which something happens.
        rank: To which of the processes.
        act: What: its end, or another function.
    """

    def arm(this: int) -> None:
        if at is not None and this == rank:
            at.arm(act)

    return finish(start(folder, overrides, ranks=ranks, arm=arm))


class FinalState(pl.Callback):
    """Every rank writes what it ended with.

    Args:
        folder: An existing folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = {**pl_module.state_dict(), **dict(pl_module.named_buffers())}
        torch.save(state, self.folder / f"final{trainer.global_rank}.pt")


@dataclass(frozen=True)
class Result:
    """What a run ended with: weights and buffers by rank, int8 state, int8 outputs and accuracies."""

    final: list[dict[str, Any]]
    int8: dict[str, Any]
    outputs: torch.Tensor
    metrics: str

    def differences(self, other: Result) -> list[str]:
        """In what the two differ by one bit."""
        pairs = zip(self.final, other.final, strict=True)
        found = [f"rank {i} {name}" for i, pair in enumerate(pairs) for name in same_state(*pair)]
        found += [f"int8 {name}" for name in same_state(self.int8, other.int8)]
        found += [] if torch.equal(self.outputs, other.outputs) else ["int8 outputs"]
        return found + ([] if self.metrics == other.metrics else ["accuracies"])


def result(folder: Path) -> Result:
    """Reads what the one finished run under `folder` ended with."""
    (path,) = folder.rglob("metrics.json")
    leftovers = [p for p in path.parent.rglob(".*") if p.name.endswith(".partial")]
    assert leftovers == []
    metrics = [line for line in path.read_text().splitlines() if "accuracy" in line]
    final = [torch.load(each, weights_only=True) for each in sorted(folder.glob("final*.pt"))]
    network = load_int8(path.parent / "int8.pt", DigitsCNN(width=8))
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Result(final, dict(network.state_dict()), network(images), "\n".join(metrics))


def output(folder: Path) -> str:
    """What the processes printed."""
    return "\n".join(p.read_text() for p in sorted(folder.glob("output*.txt")))


def _rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What `torchrun` tells a process, or within a job SLURM."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "GROUP_RANK": 0,
    }
    names |= {"TORCHELASTIC_RUN_ID": 1}
    if "SLURM_NTASKS" in os.environ:
        names = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
    return {name: str(value) for name, value in names.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
