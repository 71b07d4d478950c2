"""A rule for each command that the pages show: what a line of it must do so that a reader can type it."""

from __future__ import annotations

import importlib
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.distributed.run import get_args_parser

from qat_lightning.cli import bench, report, resolvers
from tests.pages import ROOT, Command

REST = "…"
"""Stands for further arguments, or in a path for a name that only the run knows."""

Rule = Callable[[tuple[str, ...], Path], None]


def check(command: Command, folder: Path) -> None:
    """Does what the rule of a command says; `folder` is empty, and the rule may write there."""
    assert command.name in RULES, f"{command.place}: no rule covers the command {command.name}"
    RULES[command.name](command.words[1:], folder)


# The commands of this project


def check_train(arguments: tuple[str, ...], folder: Path) -> None:
    """Every job of the line is composed, and its callback, its network and its launcher are built."""
    for cfg in composed(arguments, folder):
        OmegaConf.to_container(cfg.hydra.launcher, resolve=True, throw_on_missing=True)
        whole = {key: node for key, node in cfg.items() if key != "hydra"}
        OmegaConf.to_container(OmegaConf.create(whole), resolve=True, throw_on_missing=True)
        if cfg.quantization._target_ is not None:
            instantiate(cfg.quantization, preflight=bool(cfg.preflight), _convert_="all")
        if cfg.model.get("weights") is None:  # others are downloaded
            instantiate(cfg.classifier, _convert_="all")


def composed(arguments: tuple[str, ...], folder: Path) -> list[DictConfig]:
    """The configurations of the jobs of a `qat-train` line, with Hydra's own node."""
    flags = {each for each in arguments if each.startswith("-")}
    assert flags <= {"-m", "--help"}, flags
    given = [each for each in arguments if each not in flags and each != REST]
    overrides = [placed(each, {"float.pt": weights_in(folder)}) for each in given]
    resolvers.register()
    jobs = jobs_of(overrides) if "-m" in flags else [overrides]
    return [compose("train", [*job, f"output_dir={folder}"], return_hydra_config=True) for job in jobs]


def jobs_of(overrides: list[str]) -> Iterator[list[str]]:
    """The overrides of each job of a sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [str(each.input_line)]
        for each in parsed
    ]
    return (list(job) for job in itertools.product(*choices))


def placed(argument: str, files: Mapping[str, Path]) -> str:
    """An argument with a real path in the place of the one that only the reader knows."""
    name, _, value = argument.rpartition("=")
    if REST in value:
        assert value == REST or value.startswith(f"outputs/{REST}"), argument
        last = Path(value).name
        value = str(files[last]) if last in files else "any"
    return f"{name}={value}" if name else value


def weights_in(folder: Path) -> Path:
    path = folder / "float.pt"
    if not path.exists():
        torch.save({}, path)
    return path


def check_torchrun(arguments: tuple[str, ...], folder: Path) -> None:
    """torchrun reads the line, and starts as many processes as the configuration expects."""
    parsed = get_args_parser().parse_args(list(arguments))
    assert (parsed.module, parsed.training_script) == (True, "qat_lightning")
    check_train(tuple(parsed.training_script_args), folder)
    (cfg,) = composed(tuple(parsed.training_script_args), folder)
    machines = int(parsed.nnodes.rpartition(":")[2])  # torchrun's default is 1:1
    check_processes(cfg, machines, int(parsed.nproc_per_node))


def check_processes(cfg: DictConfig, machines: int, processes: int) -> None:
    assert cfg.trainer.get("num_nodes", 1) == machines
    assert cfg.trainer.devices == processes


def check_srun(arguments: tuple[str, ...], folder: Path) -> None:
    assert arguments[0] == "qat-train"
    check_train(arguments[1:], folder)


def check_report(arguments: tuple[str, ...], folder: Path) -> None:
    """The command reads the line, and says that there is no such run."""
    with pytest.raises(SystemExit, match=r"outputs/.* so there is nothing to measure"):
        report.main(list(arguments))


def check_bench(arguments: tuple[str, ...], folder: Path) -> None:
    parsed = bench.parser().parse_args(list(arguments))
    assert len(parsed.files) == len([each for each in arguments if not each.startswith("-")])


# Others


def check_make(arguments: tuple[str, ...], folder: Path) -> None:
    """There is such a target: make says what it would do."""
    for target in arguments:
        assert recipe(target)


def recipe(target: str) -> list[str]:
    """The commands that make would run."""
    # Under another make, this one would also name the directory.
    line = ["make", "--no-print-directory", "--dry-run", target]
    return subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def check_pip(arguments: tuple[str, ...], folder: Path) -> None:
    """The project, or one of its extras."""
    action, *requirements = arguments
    assert action == "install"
    assert requirements
    for each in requirements:
        found = re.fullmatch(r"(?:\.|qat-lightning)(?:\[([\w,]+)\])?", each)
        assert found, each
        assert set((found[1] or "all").split(",")) <= set(project()["optional-dependencies"]), each


def check_python(arguments: tuple[str, ...], folder: Path) -> None:
    """A script, a module of the repository whose parser reads the line, or pytest with a marker."""
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), arguments
        return
    module, *rest = arguments[1:]
    if module == "pytest":
        (expression,) = rest[1:]
        known = configuration()["pytest"]["ini_options"]["markers"]
        assert rest[0] == "-m"
        assert expression in {marker.partition(":")[0] for marker in known}
    elif module.startswith("benchmarks"):
        check_parser(module, [each for each in rest if each != REST])
    else:
        assert module.split(".")[0] in ("tests", "qat_lightning"), module
        assert find_spec(module) is not None
        assert not rest, f"no rule covers the arguments of {module}"


def check_parser(module: str, arguments: list[str]) -> None:
    """The script reads the values of these arguments, and its help names each of them."""
    package = find_spec(module)
    assert package is not None
    script = f"{module}.__main__" if package.submodule_search_locations else module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments, "--help"])
        shown = Printed()
        patch.setattr(sys, "stdout", shown)
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(script).main()
    assert stopped.value.code == 0, (module, arguments)
    for option in arguments:
        assert not option.startswith("--") or f"{option} " in shown.text, (module, option)


class Printed:
    """Takes what is printed."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...


def check_pre_commit(arguments: tuple[str, ...], folder: Path) -> None:
    assert arguments == ("install",)
    assert (ROOT / ".pre-commit-config.yaml").is_file()
    assert any(each.startswith("pre-commit") for each in project()["optional-dependencies"]["dev"])


def check_source(arguments: tuple[str, ...], folder: Path) -> None:
    """The environment that `make install` makes."""
    assert arguments == (".venv/bin/activate",)
    assert "\nVENV ?= .venv\n" in (ROOT / "Makefile").read_text()


def project() -> dict[str, Any]:
    return pyproject()["project"]


def configuration() -> dict[str, Any]:
    return pyproject()["tool"]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


RULES: dict[str, Rule] = {
    "make": check_make,
    "pip": check_pip,
    "pre-commit": check_pre_commit,
    "python": check_python,
    "qat-bench": check_bench,
    "qat-report": check_report,
    "qat-train": check_train,
    "source": check_source,
    "srun": check_srun,
    "torchrun": check_torchrun,
}
