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
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

import qat_lightning.cli.train
from qat_lightning import load_int8
from qat_lightning.tasks.models import DigitsCNN
from tests.moments import Moment
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
        qat_lightning.cli.train.main()
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


def result(folder: Path, network: nn.Module | None = None, shape: Sequence[int] = (1, 8, 8)) -> Result:
    """Reads what the one finished run under `folder` ended with.

    Args:
        folder: Where the command ran.
        network: The float network, by default that of `SETTINGS`.
        shape: Of an image.
    """
    (path,) = folder.rglob("metrics.json")
    leftovers = [p for p in path.parent.rglob(".*") if p.name.endswith(".partial")]
    assert leftovers == []
    metrics = [line for line in path.read_text().splitlines() if "accuracy" in line]
    final = [torch.load(each, weights_only=True) for each in sorted(folder.glob("final*.pt"))]
    int8 = load_int8(path.parent / "int8.pt", network or DigitsCNN(width=8))
    images = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    return Result(final, dict(int8.state_dict()), int8(images), "\n".join(metrics))


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
