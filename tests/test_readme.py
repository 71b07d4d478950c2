"""What the pages of the documentation show works: snippets run; commands, names and links exist."""

from __future__ import annotations

import copy
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from hydra.utils import get_object
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import qat_lightning
from benchmarks import zoo_report
from qat_lightning import export_onnx, export_openvino, prepare
from tests.networks import Residual
from tests.page_commands import REST, RULES, check, check_processes, composed, configuration, placed, recipe
from tests.pages import (
    PAGES,
    ROOT,
    Block,
    Command,
    anchors,
    blocks,
    command,
    commands,
    links,
    spans,
    text,
)
from tests.runs import TinyModule, loader, trainer

BY_RUNS = "docs/compatibility.md"
"""Its rows are proved by runs of their own."""
LANGUAGES = ("python", "console", "bash", "text")
BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [each for block in BLOCKS if block.language in ("console", "bash") for each in commands(block)] + [
    each
    for page in PAGES
    if page != BY_RUNS
    for span in spans(page)
    if span.split()[0] in RULES and " " in span
    for each in command(span, page)
]

pytestmark = pytest.mark.usefixtures("hydra")


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


# Python


class Data(LightningDataModule):
    """The reader's data."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(32, seed=1)

    def test_dataloader(self) -> DataLoader[Any]:
        return loader(32, seed=2)


class Classifier(TinyModule):
    """The reader's LightningModule."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TinyModule:
    """The reader's LightningModule, trained in float."""
    module = Classifier()
    trainer(tmp_path_factory.mktemp("float"), max_epochs=4, enable_checkpointing=False).fit(module, Data())
    return module


def train(network: nn.Module) -> None:
    """The reader's own training loop."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for images, labels in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()


def sections() -> Iterator[Any]:
    """The Python blocks under each heading: a reader types them one after the other."""
    python = [block for block in BLOCKS if block.language == "python"]
    for (page, section), found in groupby(python, key=lambda block: (block.page, block.section)):
        yield pytest.param(list(found), id=f"{page}, {section}")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("snippets", list(sections()))
def test_python_runs(
    snippets: list[Block], trained: TinyModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "module": copy.deepcopy(trained),
        "datamodule": Data(),
        "calibration_loader": loader(),
        "network": Residual(),
        "example_inputs": torch.randn(2, 3, 12, 12),
        "train": train,
        "trainer": trainer(tmp_path, max_epochs=1),
    }
    for block in snippets:
        lines = "\n" * (block.line - 1) + block.code  # a traceback shows the line of the page
        exec(compile(lines, str(ROOT / block.page), "exec"), names)


# Commands


@pytest.mark.parametrize("line", COMMANDS, ids=str)
def test_command_is_one_that_a_reader_can_type(line: Command, tmp_path: Path) -> None:
    check(line, tmp_path)


def scripts() -> list[Block]:
    return [block for block in BLOCKS if block.language == "bash"]


@pytest.mark.parametrize("script", scripts(), ids=str)
def test_batch_script_asks_for_the_processes_of_the_run(script: Block, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n"], input=script.code, text=True, check=True)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script.code, re.MULTILINE))
    (line,) = [each for each in commands(script) if each.name == "srun"]
    (cfg,) = composed(line.words[2:], tmp_path)
    check_processes(cfg, int(asked["nodes"]), int(asked["ntasks-per-node"]))
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]


def runs_here(line: Command, folder: Path) -> bool:
    """Whether the line needs no GPU, no cluster and no data but the digits."""
    if line.name == "make":
        return line.words[1] == "demo"
    if line.name != "qat-train" or "--help" in line.words:
        return line.name in ("qat-train", "qat-report", "qat-bench")
    return all(
        cfg.data._target_.endswith("DigitsData")
        and cfg.trainer.accelerator == "cpu"
        and not cfg.hydra.launcher._target_.endswith("SlurmLauncher")
        for cfg in composed(line.words[1:], folder)
    )


BEFORE = {
    "docs/resume.md": ["experiment=digits_float", "hydra.run.dir=run"],
    "docs/distributed.md": [],
    "README.md": [],
}
"""By page, what its reader has run before."""


@pytest.mark.slow
@pytest.mark.parametrize("page", BEFORE)
def test_commands_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    write_files_of_a_reader(folder)
    for arguments in BEFORE[page]:
        type_in(folder, "qat-train", arguments)
    lines = [each for block in BLOCKS if block.page == page for each in commands_of(block)]
    typed = [line for line in lines if runs_here(line, tmp_path)]
    assert typed
    for line in typed:
        if line.name == "make":
            _, script = recipe(line.words[1])[-1].split()
            type_in(folder, "python", str(ROOT / script))
        else:
            type_in(folder, line.name, *[placed(word, left_in(folder)) for word in line.words[1:]])


def commands_of(block: Block) -> list[Command]:
    return list(commands(block)) if block.language == "console" else []


def type_in(folder: Path, name: str, *arguments: str) -> None:
    """Runs a command, which has to succeed."""
    script = Path(sys.executable).with_name(name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([script, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (name, arguments, done.stdout[-3000:], done.stderr[-3000:])


def left_in(folder: Path) -> dict[str, Path]:
    """What the commands so far have left under outputs/: the newest weights, and the newest run with int8."""
    left: dict[str, Path] = {}
    for path in sorted((folder / "outputs").rglob("*"), key=lambda path: path.stat().st_mtime):
        if path.name == "float.pt":
            left[path.name] = path
        elif path.name == "report.json":
            left[REST] = path.parent
    return left


def write_files_of_a_reader(folder: Path) -> None:
    """Writes a network as float.onnx, int8.onnx and int8.xml."""
    network, images = Residual(), torch.randn(4, 3, 12, 12)
    network.eval()
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=batch, verbose=False)
    assert exported is not None
    exported.save(folder / "float.onnx")
    prepared = prepare(network.train(), backend="x86")
    train(prepared)
    export_onnx(prepared, folder / "int8.onnx", (images,))
    export_openvino(prepared, folder / "int8.xml", (images,))


# Diagrams


def test_the_diagram_of_the_packages_is_that_of_the_import_linter() -> None:
    """It stands in docs/design.md, the only block of text, and has all packages in their order."""
    (diagram,) = [block for block in BLOCKS if block.language == "text"]
    assert diagram.page == "docs/design.md"
    packages, life = diagram.code.split("A NETWORK'S LIFE")
    shown = re.findall(r"^  (\w+)(?:/|\.py) ", packages, re.MULTILINE)
    layers = configuration()["importlinter"]["contracts"][0]["layers"]
    places = {
        name: rank for rank, layer in enumerate(layers) for name in re.findall(r"qat_lightning\.(\w+)", layer)
    }
    assert sorted(shown) == sorted(places)
    assert [places[name] for name in shown] == sorted(places.values())
    inner = re.findall(r"\b(\w+/\w+)(?=[ ,])", packages)
    assert sorted(inner) == sorted(
        f"{path.parent.parent.name}/{path.parent.name}"
        for path in (ROOT / "qat_lightning").glob("*/*/__init__.py")
        if path.parent.parent.name != "tasks"
    )
    files = re.findall(r"\b(\w+/[\w/]+\.py)\b", life)
    assert files
    assert all((ROOT / "qat_lightning" / name).is_file() for name in files)


# Names and links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links(page):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(str(path.resolve().relative_to(ROOT))), link


def rooms() -> list[str]:
    """The packages, by the names that the pages use."""
    return [path.name for path in (ROOT / "qat_lightning").iterdir() if (path / "__init__.py").is_file()]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """Paths are relative to the repository, or to the package."""
    tops = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    for span in spans(page):
        if re.fullmatch(rf"(?:{tops})/[\w./-]*", span) and not span.startswith("outputs"):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(rf"(?:{'|'.join(rooms())})/[\w./-]*|\w+\.py", span):
            assert (ROOT / "qat_lightning" / span).exists() or (ROOT / "examples" / span).exists(), span


THE_READERS = {"mask", "flag"}
"""Arguments that the README makes up."""


@cache
def keywords() -> frozenset[str]:
    """The arguments of the package, of the Trainer and of its strategy."""
    ours = [getattr(qat_lightning, name) for name in qat_lightning.__all__]
    theirs = [Trainer, Trainer.fit, Trainer.test, DDPStrategy, DistributedDataParallel, DataLoader]
    signed = [each for each in [*ours, *theirs] if inspect.isfunction(each) or "__init__" in vars(each)]
    known = {name for each in signed for name in inspect.signature(each).parameters}
    return frozenset(known | set(qat_lightning.ModuleOptions.__annotations__) | THE_READERS)


@pytest.mark.parametrize("page", [page for page in PAGES if page != BY_RUNS])
def test_arguments_that_are_named_exist(page: str, tmp_path: Path) -> None:
    """Arguments of the package, fields of the configuration or its groups."""
    cfg = compose("train", [f"output_dir={tmp_path}", "hydra/launcher=slurm"], return_hydra_config=True)
    missing = object()
    for span in spans(page):
        if span.split()[0] in RULES:
            continue
        for plus, name in re.findall(r"(?:^|[\s(,])(\+?)([A-Za-z][\w./-]*)=", span):
            known = name in keywords() or (ROOT / "conf" / name).is_dir()
            key = name.rpartition(".")[0] if plus else name  # what is added has a place
            assert known or OmegaConf.select(cfg, key, default=missing) is not missing, (span, name)


@cache
def sources() -> frozenset[str]:
    """Every word of the code, the configuration and the tests."""
    files = [*ROOT.glob("*.toml"), ROOT / "Makefile"]
    for folder, kind in (("qat_lightning", "py"), ("conf", "yaml"), ("examples", "py"), ("benchmarks", "py")):
        files += (ROOT / folder).rglob(f"*.{kind}")
    words = {word for path in files for word in re.findall(r"\w+", path.read_text())}
    return frozenset(words | set(StrategyRegistry.available_strategies()))


@pytest.mark.parametrize("page", PAGES)
def test_names_of_code_are_in_the_code(page: str) -> None:
    for span in spans(page):
        if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+|[A-Z]\w*[a-z]\w*[A-Z]\w*", span):
            assert span in sources(), span
        if re.fullmatch(r"qat_lightning(\.\w+)+", span):
            assert get_object(span) is not None, span


def test_the_zoo_has_the_words_of_its_script() -> None:
    page = text("docs/zoo.md")
    assert page.startswith(zoo_report.HEAD)
    assert zoo_report.COLUMNS in page
