"""Runs of the command that are killed, interrupted or stopped by a full disk, and what comes of them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torchvision

from qat_lightning.tasks.classifier import ImageClassifier
from tests.interruption import SETTINGS, Result, kill_oneself, output, result, run
from tests.moments import MOMENTS, Call
from tests.soak import KINDS, Kind, Trial, verdict

Whole = Callable[[Kind], Result]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What uninterrupted runs end with, by their kind."""
    results: dict[Kind, Result] = {}

    def of(kind: Kind) -> Result:
        if kind not in results:
            folder = tmp_path_factory.mktemp("whole")
            assert not any(run(folder, *kind.settings, ranks=kind.ranks)), output(folder)
            results[kind] = result(folder)
        return results[kind]

    return of


# Killed


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        (0, "half a later checkpoint"),
        (0, "before the int8 file is in place"),
        pytest.param(1, "the last step", marks=pytest.mark.slow),
        pytest.param(1, "a validation", marks=pytest.mark.slow),
        (3, "a step in mid-epoch"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path, whole: Whole, kind: int, when: str) -> None:
    trial = Trial(KINDS[kind], when, MOMENTS[when], victims=(KINDS[kind].ranks - 1,))
    assert verdict(trial, tmp_path, whole(trial.kind)) == "equal"


@pytest.mark.slow
def test_soak() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.soak"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_killed_run_of_a_torchvision_network(tmp_path: Path) -> None:
    settings = [
        *(
            "model=resnet18",
            "data=synthetic",
            "data.num_samples=24",
            "data.image_size=32",
            "data.batch_size=8",
        ),
        *(
            "trainer.max_epochs=2",
            "trainer.enable_progress_bar=false",
            "callbacks.last.every_n_train_steps=1",
        ),
        *("optimizer.lr=0.01", "model.weights=null"),
    ]

    def ended(folder: Path) -> Result:
        return result(folder, torchvision.models.resnet18(num_classes=10), (3, 32, 32))

    assert run(tmp_path / "whole", *settings) == [0]
    at = Call(ImageClassifier, "validation_step", 3)
    assert run(tmp_path / "killed", *settings, "resume=auto", at=at) == [-9]
    assert run(tmp_path / "killed", *settings, "resume=auto") == [0], output(tmp_path / "killed")
    assert ended(tmp_path / "killed").differences(ended(tmp_path / "whole")) == []


def test_the_comparison_sees_one_bit(whole: Whole) -> None:
    one = whole(KINDS[0])
    other = result_with_one_bit_more(one)
    assert one.differences(one) == []
    assert one.differences(other) == ["rank 0 network.head.bias"]


def result_with_one_bit_more(one: Result) -> Result:
    bias = one.final[0]["network.head.bias"].clone()
    bias[0] = bias[0].nextafter(bias[0] + 1)
    return Result([{**one.final[0], "network.head.bias": bias}], one.int8, one.outputs, one.metrics)


# Interrupted


def test_ctrl_c(tmp_path: Path, whole: Whole) -> None:
    exception = [
        "+callbacks.exception._target_=lightning.pytorch.callbacks.OnExceptionCheckpoint",
        "+callbacks.exception.dirpath=${output_dir}/exception",
    ]
    command = [*SETTINGS, *exception, "resume=auto"]
    at = Call(ImageClassifier, "training_step", 9)

    def press() -> None:
        # A job in a shell's background ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)

    assert run(tmp_path, *command, at=at, act=press) == [1]
    assert list(tmp_path.rglob("int8.pt")) == list(tmp_path.rglob("metrics.json")) == []
    assert "Converted" not in output(tmp_path)
    assert len(list(tmp_path.rglob("on_exception.ckpt"))) == 1
    assert run(tmp_path, *command) == [0], output(tmp_path)
    assert "on_exception.ckpt: it was written in the middle of a training step" in output(tmp_path)
    assert result(tmp_path).differences(whole(KINDS[0])) == []


@pytest.mark.parametrize(
    ("kind", "method", "count"),
    [
        (0, "training_step", 8),
        pytest.param(2, "training_step", 8, marks=pytest.mark.slow),
        (0, "validation_step", 5),
    ],
)
def test_slurm_requeues(
    tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch, kind: int, method: str, count: int
) -> None:
    ranks, settings = KINDS[kind].ranks, KINDS[kind].settings
    expected = whole(KINDS[kind])
    monkeypatch.setenv("PATH", f"{fake_scontrol(tmp_path / 'bin')}:{os.environ['PATH']}")
    job = {
        "NTASKS": ranks,
        "NTASKS_PER_NODE": ranks,
        "JOB_ID": 7,
        "JOB_NAME": "train",
        "NODEID": 0,
        "NODELIST": "localhost",
    }
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))

    def requeue() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        Call(ImageClassifier, method).arm(kill_oneself)

    folder = tmp_path / "run"
    at = Call(ImageClassifier, method, count)
    run(folder, *settings, "resume=auto", at=at, act=requeue, ranks=ranks)
    (saved,) = folder.rglob("hpc_ckpt_1.ckpt")
    assert (tmp_path / "bin" / "called").read_text() == "requeue 7\n"
    assert not any(run(folder, *settings, "resume=auto", ranks=ranks)), output(folder)
    assert f"continuing from {saved}" in output(folder)
    assert result(folder).differences(expected) == []


def fake_scontrol(folder: Path) -> Path:
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\n')
    script.chmod(0o755)
    return folder


# A full disk


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room() -> None:
    """No file of this process grows beyond 14 kB from now on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("act", [full_disk, no_room])
def test_a_disk_that_is_full_when_the_int8_file_is_written(
    tmp_path: Path, whole: Whole, act: Callable[[], None]
) -> None:
    command = [*SETTINGS, "resume=auto"]
    assert run(tmp_path, *command, at=MOMENTS["writing the int8 file"], act=act) == [1]
    said = output(tmp_path)
    assert "could not be converted to int8 and written" in said
    assert "The trained weights are safe" in said
    assert [p.name for p in tmp_path.rglob("*") if "int8" in p.name or "metrics.json" in p.name] == []
    assert run(tmp_path, *command) == [0], output(tmp_path)  # after there is room again
    assert result(tmp_path).differences(whole(KINDS[0])) == []


def test_a_disk_that_is_full_when_a_checkpoint_is_written(tmp_path: Path, whole: Whole) -> None:
    command = [*SETTINGS, "resume=auto"]
    at = MOMENTS["before the last checkpoint is in place"]
    assert run(tmp_path, *command, at=at, act=full_disk) == [1]
    assert "No space left on device" in output(tmp_path)
    assert list(tmp_path.rglob("int8.pt")) == []
    assert run(tmp_path, *command) == [0], output(tmp_path)
    assert result(tmp_path).differences(whole(KINDS[0])) == []
