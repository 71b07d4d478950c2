"""`qat-train resume=auto`: which run and which checkpoint it finds, and what it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from qat_lightning.cli.auto_resume import SameStart, Start, find_start, save_config
from qat_lightning.cli.launch import pass_on
from qat_lightning.cli.train import train
from qat_lightning.run.checkpoints import checkpoints_in
from tests.interruption import DDP, IN_MID_EPOCH, SETTINGS, finish, kill, output, result, run, start
from tests.moments import MOMENTS
from tests.runs import trainer

ROOT = Path(__file__).parent.parent
SHORT = ["trainer.enable_progress_bar=false", "+trainer.limit_train_batches=2", "quantization.convert=null"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*freeze.*:UserWarning"),
]


@pytest.fixture
def hydra() -> Iterator[None]:
    with initialize_config_module("qat_lightning.conf", version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def configure(folder: Path, *overrides: str) -> DictConfig:
    return compose("train", overrides=[f"output_dir={folder}", *SHORT, *overrides])


@pytest.fixture
def interrupted(tmp_path: Path, hydra: None) -> Path:
    """The folder of a run whose results have not been written."""
    folder = tmp_path / "run"
    train(configure(folder, "trainer.max_epochs=1"))
    (folder / "metrics.json").unlink()
    return folder


# What is found


@pytest.mark.usefixtures("hydra")
def test_nothing_is_found_at_first(tmp_path: Path) -> None:
    assert find_start(configure(tmp_path, "resume=auto")) == Start(tmp_path)


def test_the_last_checkpoint_is_found(interrupted: Path) -> None:
    cfg = configure(interrupted, "trainer.max_epochs=1", "resume=auto")
    assert find_start(cfg) == Start(interrupted, str(interrupted / "checkpoints/last.ckpt"))
    (interrupted / "checkpoints/last.ckpt").write_bytes(b"PK")
    (best,) = (interrupted / "checkpoints").glob("epoch*.ckpt")
    assert find_start(cfg) == Start(interrupted, str(best))
    best.unlink()
    assert find_start(cfg) == Start(interrupted)


def test_a_finished_run_gives_its_results_again(tmp_path: Path, hydra: None) -> None:
    metrics = train(configure(tmp_path, "trainer.max_epochs=1", "resume=auto"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(configure(tmp_path, "trainer.max_epochs=1", "resume=auto")) == metrics
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_another_configuration_in_the_same_folder_is_an_error(interrupted: Path) -> None:
    match = r"another configuration: seed is 0 in the folder, but 1 in this run; data\.seed"
    with pytest.raises(ValueError, match=match):
        find_start(configure(interrupted, "trainer.max_epochs=3", "seed=1", "resume=auto"))


def test_checkpoints_of_an_earlier_run_in_the_folder_are_not_taken(interrupted: Path) -> None:
    cfg = configure(interrupted, "trainer.max_epochs=1", "resume=auto")
    save_config(cfg, Start(interrupted))  # started anew, and killed at once
    assert find_start(cfg) == Start(interrupted)


def test_a_run_that_goes_on_keeps_its_checkpoints(interrupted: Path) -> None:
    (interrupted / ".int8.pt.1234.partial").touch()
    (interrupted / "metrics.json").write_text("{}")
    cfg = configure(interrupted, "trainer.max_epochs=2", f"ckpt_path={interrupted}/checkpoints/last.ckpt")
    save_config(cfg, find_start(cfg))  # longer than before, and killed at once
    again = configure(interrupted, "trainer.max_epochs=2", "resume=auto")
    assert find_start(again).checkpoint == str(interrupted / "checkpoints/last.ckpt")
    assert [path.name for path in interrupted.iterdir() if path.name[0] != "." and path.is_file()] == [
        "config.yaml"
    ]


@pytest.mark.usefixtures("hydra")
def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"finds the checkpoint itself, but ckpt_path=a\.ckpt names one, too"
    ):
        train(configure(tmp_path, "resume=auto", "ckpt_path=a.ckpt"))
    with pytest.raises(ValueError, match=r"resume must be auto or null, but received 'last'.*ckpt_path="):
        train(configure(tmp_path, "resume=last"))
    assert find_start(configure(tmp_path, "ckpt_path=a.ckpt")) == Start(tmp_path, "a.ckpt")


def test_further_processes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qat-train", "-m", "seed=1", "resume=auto", "+output_dir=x"])
    pass_on(resume=None, output_dir="/a b/it's", ckpt_path=None)
    assert sys.argv == [
        "qat-train",
        "-m",
        "seed=1",
        "resume=null",
        r"output_dir='/a b/it\'s'",
        "ckpt_path=null",
    ]


def test_all_processes_begin_at_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[Any], mine: Any) -> None:
        found[:] = [mine, "another.ckpt"]

    monkeypatch.setattr("qat_lightning.cli.auto_resume.distributed.all_gather_object", gather)
    runner: Any = trainer(tmp_path)
    monkeypatch.setattr(type(runner), "world_size", 2)
    with pytest.raises(
        RuntimeError, match=r"start from one checkpoint, but.*'one.ckpt', 'another.ckpt'.*file system"
    ):
        SameStart(Start(tmp_path, "one.ckpt")).setup(runner, None, "fit")  # type: ignore[arg-type]


# The command, whose run folders have the time in their names


def test_the_command_goes_on_in_the_first_folder(tmp_path: Path) -> None:
    first = [*SETTINGS, IN_MID_EPOCH, "hydra.run.dir=outputs/${now:%Y-%m-%d}/${now:%H-%M-%S.%f}"]
    run(tmp_path, *first, at=MOMENTS["a step in mid-epoch"])  # without resume=auto
    run(tmp_path, *first, "seed=1", at=MOMENTS["a step in mid-epoch"])  # another run
    (folder, other) = sorted(path.parent for path in tmp_path.rglob("checkpoints"))
    before = checkpoints_in(other)
    assert run(tmp_path, *first, "resume=auto") == [0], output(tmp_path)
    assert f"resume=auto: continuing from {folder}/checkpoints/last.ckpt" in output(tmp_path)
    assert [path.parent for path in tmp_path.rglob("metrics.json")] == [folder]
    assert checkpoints_in(other) == before
    assert result(folder.parents[2]).metrics
    assert run(tmp_path, *first, "resume=auto", at=MOMENTS["the first step"]) == [0]  # trains nothing
    assert f"resume=auto: {folder} is finished" in output(tmp_path)


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    command = [*SETTINGS, "hydra.run.dir=run", "resume=auto"]
    first = start(tmp_path, [*command, "trainer.max_epochs=100"])
    while not (tmp_path / "run/config.yaml").is_file():
        time.sleep(0.01)
    assert run(tmp_path, *SETTINGS, "hydra.run.dir=run") == [1]
    kill(first)
    assert finish(first) == [-9]
    assert f"Another process is still writing to {tmp_path}/run" in output(tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert run(tmp_path, *command) == [0]


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_a_killed_group_of_processes_goes_on(tmp_path: Path, launcher: str, sweep: bool) -> None:
    if sweep and launcher == "torchrun":
        pytest.skip("Hydra's sweeps and torchrun do not go together")
    program = ["-m", "qat_lightning"]
    if launcher == "torchrun":
        program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program]
    jobs = ["-m", "hydra.sweep.dir=sweeps/${now:%H-%M-%S}", "seed=0,1"] if sweep else []
    command = [sys.executable, *program, *jobs, *SETTINGS, *DDP, IN_MID_EPOCH, "resume=auto"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    wait(spawn(command, whole))
    process = spawn(command, killed)
    while not list(killed.rglob("last.ckpt")):
        time.sleep(0.05)
    for each in tree(process.pid):  # torchrun's workers are groups of their own
        os.kill(each, signal.SIGKILL)
    process.communicate()
    said = wait(spawn(command, killed))
    assert said.count("continuing from") == 1
    assert read(killed) == read(whole)
    assert len(read(whole)) == (2 if sweep else 1)


def spawn(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def wait(process: subprocess.Popen[str]) -> str:
    try:
        said, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return said


def tree(process: int) -> list[int]:
    """A process and those that it started, and so on."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(each for child in children for each in tree(int(child)))]


def read(folder: Path) -> list[Any]:
    """The accuracies and the bytes of the int8 files under a folder, job by job."""
    found = []
    for path in sorted(folder.rglob("metrics.json"), key=lambda path: path.parent.name):
        metrics = json.loads(path.read_text())
        accuracies = [metrics[key] for key in ("fake_quant_accuracy", "int8_accuracy")]
        found.append((accuracies, (path.parent / "int8.pt").read_bytes()))
    return found
