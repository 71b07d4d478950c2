"""`qat-train` on several processes, however they are started: one result, from the first of them."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from qat_lightning import load_int8
from qat_lightning.cli import launch, resolvers
from qat_lightning.tasks.models import DigitsCNN
from tests.processes import free_port, run_all

SHORT = [
    "-m",
    "qat_lightning",
    "experiment=digits_demo",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "+trainer.limit_train_batches=3",
]
ON_CPU = ["trainer=ddp_multinode", "trainer.accelerator=cpu", "trainer.devices=1"]
TORCHRUN = ["-m", "torch.distributed.run"]
SWEEP = [*SHORT[:2], "--multirun", *SHORT[2:]]
Command = tuple[list[str], dict[str, str]]


def started_by(way: str) -> list[Command]:
    """The command lines of two processes, or of what starts them."""
    port = free_port()
    if way == "Lightning":
        return [([*SHORT, "trainer=ddp_cpu"], {})]
    if way == "torchrun":
        options = ["--nproc-per-node=2", f"--master-port={port}"]
        return [([*TORCHRUN, *options, *SHORT, "trainer=ddp_cpu"], {})]
    if way == "torchrun, c10d":
        common = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job"]
        return [
            ([*TORCHRUN, *common, f"--rdzv-endpoint=127.0.0.1:{port}", *SHORT, *ON_CPU], {}) for _ in range(2)
        ]
    if way == "torchrun, static":
        common = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
        return [([*TORCHRUN, *common, f"--node-rank={node}", *SHORT, *ON_CPU], {}) for node in range(2)]
    nodes = 2 if way == "SLURM, two nodes" else 1
    line = [*SHORT, *ON_CPU] if nodes == 2 else [*SHORT, "trainer=ddp_cpu"]
    return [(line, slurm(rank, nodes, port)) for rank in range(2)]


def slurm(rank: int, nodes: int, port: int) -> dict[str, str]:
    """What srun sets for one of two tasks."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": str(2 // nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank if nodes == 1 else 0),
        "SLURM_NODEID": str(rank if nodes == 2 else 0),
        "MASTER_PORT": str(port),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        "torchrun, static",
        *(
            pytest.param(way, marks=pytest.mark.slow)
            for way in ("Lightning", "torchrun", "torchrun, c10d", "SLURM", "SLURM, two nodes")
        ),
    ],
)
def test_one_result_however_processes_are_started(tmp_path: Path, way: str) -> None:
    printed = "".join(run_all(started_by(way), tmp_path))
    (run,) = [path.parent for path in tmp_path.rglob("metrics.json")]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["int8_path"] == str(run / "int8.pt")
    assert metrics["int8_accuracy"] is not None
    assert printed.count("test accuracy") == printed.count("Converted to int8") == 1
    written = [str(path.relative_to(run)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(written) == sorted(
        [
            *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")),
            *(
                ".lock",
                "config.yaml",
                "int8.pt",
                "logs/version_0/metrics.csv",
                "manifest.json",
                "metrics.json",
                "report.html",
                "report.json",
                "train.log",
            ),
            *(f"checkpoints/{path.name}" for path in (run / "checkpoints").iterdir()),
        ]
    )
    if way.startswith("SLURM"):
        assert run == tmp_path / "outputs" / "slurm" / "4711.0"


# What the configuration asks of the process


def test_the_name_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(resolvers.run_name().split("-")) == 5
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert len(resolvers.run_name().split("-")) == 5
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert resolvers.run_name() == "slurm/12"
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    assert resolvers.run_name() == "slurm/12.3"


def test_tasks_are_as_many_as_devices() -> None:
    resolvers.register()
    assert OmegaConf.create({"devices": 4, "tasks": "${tasks:${devices}}"}).tasks == 4
    for devices in (-1, 0, "auto"):
        with pytest.raises(ValueError, match=f"trainer.devices=4, but trainer.devices is {devices!r}"):
            resolvers.tasks(devices)


# Jobs of a sweep


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "job", "WORLD_SIZE": "2"}),
        ("srun", {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}),
    ],
)
def test_processes_that_are_there_once_run_no_sweep(
    monkeypatch: pytest.MonkeyPatch, name: str, environment: dict[str, str]
) -> None:
    launch._check_sweep()
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=f"but {name} has started these once"):
        launch._check_sweep()
    if name == "srun":
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        launch._check_sweep()


def without_the_plugin(folder: Path) -> str:
    script = folder / "without.py"
    script.write_text(
        "import sys\n"
        "sys.modules['hydra_plugins'] = None\n"
        "from qat_lightning.cli.train import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    sys.exit(0 if end.code else 1)\n"
    )
    return str(script)


@pytest.mark.parametrize("launcher", ["slurm", pytest.param("slurm_here", marks=pytest.mark.slow)])
def test_without_the_plugin_an_error_names_the_extra(tmp_path: Path, launcher: str) -> None:
    line = [without_the_plugin(tmp_path), "-m", f"hydra/launcher={launcher}", "trainer=ddp_cpu"]
    (printed,) = run_all([(line, {})], tmp_path)
    assert 'Install it with: pip install "qat-lightning[slurm]"' in printed
    assert not list(tmp_path.rglob("multirun.yaml"))


@pytest.mark.slow
def test_a_sweep_through_submitit_on_this_machine(tmp_path: Path) -> None:
    """Each job starts a second process, whose command line is not submitit's."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    line = [*SWEEP, "hydra/launcher=slurm_here", "trainer=ddp_cpu", "backend=x86,onednn"]
    run_all([([*line, "hydra.sweep.dir=sweep"], {})], tmp_path)
    for job, backend in enumerate(("x86", "onednn")):
        folder = tmp_path / "sweep" / str(job)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert Path(metrics["int8_path"]) == folder / "int8.pt"
        assert load_int8(folder / "int8.pt", DigitsCNN())(torch.randn(2, 1, 8, 8)).shape == (2, 10)
        assert OmegaConf.load(folder / "config.yaml").quantization.backend == backend
    assert len(list(tmp_path.rglob("int8.pt"))) == 2


SBATCH = """
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
option = lambda name: re.search(rf"^#SBATCH --{name}=(\\S+)", script, re.M).group(1)
array, tasks = "array" in script, int(option("ntasks-per-node"))
with open("sbatch.txt", "a") as file:
    file.write(script)
command = re.search(r"^srun .*? (/\\S*python\\S* -u -m submitit.core._submit .*)$", script, re.M).group(1)
for job in range(int(option("array").split("-")[1].split("%")[0]) + 1 if array else 1):
    running = []
    for rank in range(tasks):
        own = {"SLURM_JOB_ID": f"{4711 + job}", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": str(job)}
        own |= {"SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_NNODES": "1"}
        own |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
        own |= {"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "SLURM_STEP_ID": "0"}
        own |= {"SUBMITIT_EXECUTOR": "slurm"}
        line = command.replace("%A_%a", f"4711_{job}").replace("%t", str(rank))
        running.append(subprocess.Popen(line, shell=True, env={**os.environ, **own}))
    for process in running:
        process.wait()
"""


def pretend_slurm(folder: Path) -> str:
    """A folder of commands that run on this machine what SLURM would run on its nodes."""
    folder.mkdir()
    (folder / "sbatch.py").write_text(SBATCH)
    commands = {
        "sbatch": f'{sys.executable} {folder}/sbatch.py "$@" > {folder}/log 2>&1 &\n'
        "echo Submitted batch job 4711",
        "srun": "exit 0",
        "sacct": 'echo "JobID|State|NodeList"; for i in 0 1; do echo "4711_$i|RUNNING|here"; done',
    }
    for name, body in commands.items():
        file = folder / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(folder)


@pytest.mark.slow
def test_a_sweep_through_submitit_on_slurm(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    path = f"{pretend_slurm(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}"
    line = [*SWEEP, "hydra/launcher=slurm", "trainer=ddp_cpu", "backend=x86,onednn"]
    options = ["hydra.sweep.dir=sweep", "hydra.launcher.partition=gpu"]
    extra: dict[str, Any] = {"PATH": path, "MASTER_PORT": str(free_port())}
    run_all([([*line, *options], extra)], tmp_path)
    script = (tmp_path / "sbatch.txt").read_text()
    for option in ("nodes=1", "ntasks-per-node=2", "partition=gpu", "cpus-per-task=4", "time=1440"):
        assert f"#SBATCH --{option}\n" in script
    for job in range(2):
        folder = tmp_path / "sweep" / str(job)
        assert json.loads((folder / "metrics.json").read_text())["int8_path"] == str(folder / "int8.pt")
    assert len(list(tmp_path.rglob("int8.pt"))) == 2
