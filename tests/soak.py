"""`make soak`: kills `qat-train` at many moments, and compares what it ends with after `resume=auto`.

    python -m tests.soak [--seed 0] [--random 12]

Every moment of `tests.interruption.MOMENTS`, with checkpoints after epochs and in mid-epoch, and random
times, with one process and with two; of two, one rank or both are killed. Prints a line for each, and exits
with 1 if any run ended with one bit of difference.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.interruption import DDP, IN_MID_EPOCH, SETTINGS, Result, finish, kill, output, result, run, start
from tests.moments import MOMENTS, Moment


class Kind(NamedTuple):
    """A sort of run: what it is called, its processes and its settings."""

    name: str
    ranks: int
    settings: tuple[str, ...]


KINDS = (
    Kind("1 process", 1, SETTINGS),
    Kind("1 process, mid-epoch", 1, (*SETTINGS, IN_MID_EPOCH)),
    Kind("2 processes", 2, (*SETTINGS, *DDP)),
    Kind("2 processes, mid-epoch", 2, (*SETTINGS, *DDP, IN_MID_EPOCH)),
)


class Trial(NamedTuple):
    """One run to be killed: at a moment of one rank, or after a time."""

    kind: Kind
    when: str
    moment: Moment | None = None
    seconds: tuple[float, ...] = ()
    victims: tuple[int, ...] = (0,)


def trials(seed: int, count: int, duration: dict[Kind, float]) -> Iterator[Trial]:
    """The moments by design, then the random times, in an order that the seed alone determines."""
    generator = random.Random(seed)
    for kind in KINDS:
        for when, moment in MOMENTS.items():
            yield Trial(kind, when, moment)
        if kind.ranks > 1:
            for when in ("a step in mid-epoch", "a validation"):
                yield Trial(kind, f"{when}, on rank 1", MOMENTS[when], victims=(1,))
        for _ in range(count):
            times = tuple(generator.uniform(0, duration[kind]) for _ in range(generator.choice((1, 1, 2))))
            victims = generator.choice(((0,), (1,), (0, 1))) if kind.ranks > 1 else (0,)
            when = f"after {' and '.join(f'{t:.2f} s' for t in times)}, ranks {victims}"
            yield Trial(kind, when, None, times, victims)


def verdict(trial: Trial, folder: Path, whole: Result) -> str:
    """Interrupts a run and lets it go on; says what is different, or that nothing is."""
    command, ranks = (*trial.kind.settings, "resume=auto"), trial.kind.ranks
    if trial.moment is not None:
        codes = run(folder, *command, ranks=ranks, at=trial.moment, rank=trial.victims[0])
        if codes[trial.victims[0]] != -9:
            return f"was not killed: {codes}\n{output(folder)}"
    for seconds in trial.seconds:
        processes = start(folder, command, ranks=ranks)
        time.sleep(seconds)
        kill([processes[victim] for victim in trial.victims])
        finish(processes)
    if any(codes := run(folder, *command, ranks=ranks)):
        return f"failed to go on: {codes}\n{output(folder)}"
    return ", ".join(result(folder).differences(whole)) or "equal"


def main() -> int:
    """Runs all trials."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="names the random moments")
    parser.add_argument("--random", type=int, default=12, help="random moments for each kind of run")
    arguments = parser.parse_args()
    failures = total = 0
    with tempfile.TemporaryDirectory() as name:
        root, whole, duration = Path(name), {}, {}
        for index, kind in enumerate(KINDS):
            began = time.monotonic()
            assert not any(run(root / f"whole{index}", *kind.settings, ranks=kind.ranks))
            duration[kind] = time.monotonic() - began
            whole[kind] = result(root / f"whole{index}")
        for trial in trials(arguments.seed, arguments.random, duration):
            total += 1
            said = verdict(trial, root / str(total), whole[trial.kind])
            failures += said != "equal"
            print(f"{total:3} {trial.kind.name:22} {trial.when:45} {said}", flush=True)
    print(f"{total} interruptions, {failures} differences")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
