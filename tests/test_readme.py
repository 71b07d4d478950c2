"""Every snippet of the README and of the pages beside it runs, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from lightning.pytorch import LightningDataModule, Trainer

from qat_lightning import QuantizationAwareTraining, convert
from qat_lightning.cli import bench, report
from tests.networks import ConvBnRelu, Residual
from tests.runs import TinyModule, dataset

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/resume.md", "docs/distributed.md", "docs/design.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = [
    pytest.mark.usefixtures("hydra"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


def snippets(language: str) -> list[Any]:
    """The fenced blocks of a language, page by page."""
    found = {page: [code for kind, code in FENCE.findall(text(page)) if kind == language] for page in PAGES}
    return [pytest.param(page, codes, id=page) for page, codes in found.items() if codes]


def text(page: str) -> str:
    return (ROOT / page).read_text()


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(dataset(16), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


class Module(TinyModule):
    """Logs an accuracy, as a reader's own module would."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        correct: Any = self(batch[0]).argmax(1) == batch[1]
        self.log("val_accuracy", correct.float().mean())


def small_trainer(**options: Any) -> Trainer:
    """The reader's Trainer, with little to do and little to say."""
    little: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    little |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(**{**little, **options, "max_epochs": min(options.get("max_epochs", 1), 2)})


def readers_names() -> dict[str, Any]:
    """What a snippet takes for granted: the reader's module, data and Trainer."""
    module = Module(Residual())
    module.model(torch.randn(16, 3, 12, 12))  # a target takes a trained network: this one has seen data
    return {
        "Trainer": small_trainer,
        "QuantizationAwareTraining": QuantizationAwareTraining,
        "convert": convert,
        "module": module,
        "datamodule": Data(),
        "calibration_loader": Data().val_dataloader(),
        "network": ConvBnRelu(),
        "example_inputs": torch.randn(2, 3, 12, 12),
        "trainer": small_trainer(max_epochs=1, enable_checkpointing=False),
        "qat": QuantizationAwareTraining(),
    }


@pytest.mark.parametrize(("page", "codes"), snippets("python"))
def test_python_snippets_run(
    page: str, codes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for code in codes:
        names = readers_names()
        if "load_int8" in code:
            names |= trained(tmp_path)
        code = code.replace("...  # train it", "prepared(example_inputs)")
        # The reader's Trainer is the small one.
        code = re.sub(
            r"^from lightning\.pytorch import (.*?),? ?Trainer$", _without_trainer, code, flags=re.M
        )
        exec(compile(code, page, "exec"), names)


def _without_trainer(found: re.Match[str]) -> str:
    return f"from lightning.pytorch import {found[1]}" if found[1] else ""


def trained(folder: Path) -> dict[str, Any]:
    """What the snippets before would have left: a run that has ended, and a network that was trained."""
    qat = QuantizationAwareTraining()
    trainer = small_trainer(max_epochs=1, callbacks=[qat], default_root_dir=folder)
    module = TinyModule(Residual())
    trainer.fit(module)
    return {"qat": qat, "trainer": trainer, "Module": lambda: TinyModule(Residual())}


# Commands


def check_make(arguments: list[str], folder: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert arguments[0] in targets


def check_pip(arguments: list[str], folder: Path) -> None:
    assert arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"\[(.*)\]", arguments[1]):
        assert set(name.split(",")) <= set(extras)


def check_train(arguments: list[str], folder: Path) -> None:
    """Composes the configuration: every group, option and field of the command exists."""
    weights = folder / "float.pt"
    torch.save({}, weights)
    given = [each.replace("outputs/…/float.pt", str(weights)) for each in arguments if each[0] != "-"]
    overrides = [each.split(",")[0] if each.startswith("backend=") else each for each in given if each != "…"]
    assert set(arguments) - set(given) - {f"weights={weights}"} <= {"-m", "--help", *arguments}
    launch = [each for each in overrides if each.startswith("hydra")]
    plain = [each for each in overrides if not each.startswith("hydra")]
    cfg = compose("train", overrides=[f"output_dir={folder}", *plain])
    assert cfg.quantization is not None
    for each in launch:
        group, _, option = each.partition("=")
        assert "." in group or (ROOT / "conf" / group / f"{option}.yaml").is_file(), each


def check_torchrun(arguments: list[str], folder: Path) -> None:
    at = arguments.index("qat_lightning")
    assert arguments[at - 1] == "-m"
    check_train(arguments[at + 1 :], folder)


def check_report(arguments: list[str], folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"outputs") as stopped:  # parsed, and there is no such run
        report.main(arguments)
    assert stopped.value.code != 2


def check_bench(arguments: list[str], folder: Path) -> None:
    parsed = bench.parser().parse_args(arguments)
    assert len(parsed.files) == len(arguments)


def check_python(arguments: list[str], folder: Path) -> None:
    assert arguments[:2] == ["-m", "pytest"] or (ROOT / f"{arguments[1].replace('.', '/')}").exists()


COMMANDS: dict[str, Callable[[list[str], Path], None]] = {
    "make": check_make,
    "pip": check_pip,
    "qat-train": check_train,
    "torchrun": check_torchrun,
    "qat-report": check_report,
    "qat-bench": check_bench,
    "python": check_python,
    "srun": lambda arguments, folder: check_train(arguments[arguments.index("qat-train") + 1 :], folder),
    "pre-commit": lambda arguments, folder: None,
}


@pytest.mark.parametrize(("page", "codes"), snippets("console"))
def test_console_snippets_are_commands_that_work(page: str, codes: list[str], tmp_path: Path) -> None:
    written = [line for code in codes for line in code.replace("\\\n", "").splitlines()]
    lines = [line.removeprefix("$ ") for line in written if line.startswith("$ ")]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        words = [word for i, word in enumerate(words) if i or "=" not in word]
        command = Path(words[0]).name
        assert command in COMMANDS, f"no test knows the command of this line of {page}: {line}"
        COMMANDS[command](words[1:], tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_kind_that_is_run(page: str) -> None:
    kinds = {kind for kind, _ in FENCE.findall(text(page))}
    assert kinds <= {"python", "console", "bash"}


@pytest.mark.parametrize("page", sorted({*PAGES, *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))}))
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(page)):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
    folders = "docs|examples|benchmarks|conf|qat_lightning|tests"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+\w)`", text(page)):
        assert (ROOT / name).exists(), name


def test_the_rooms_in_the_design_are_those_of_the_house() -> None:
    page = text("docs/design.md")
    rooms = {
        path.name for path in (ROOT / "qat_lightning").iterdir() if path.is_dir() and path.name[0] != "_"
    }
    for room in rooms:
        assert f"{room}/" in page, room
    for name in re.findall(rf"`((?:{'|'.join(rooms)})/[\w/]+\.py)`", page):
        assert (ROOT / "qat_lightning" / name).is_file(), name
