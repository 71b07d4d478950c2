"""The house keeps its rooms: few of them, small ones, and imports that go downward only."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qat_lightning"
ROOMS = 12
FILES = 15


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def house(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_contracts_are_kept(house: Path) -> None:
    done = lint(house)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "planted", "contract"),
    [
        ("base/cpu.py", "import qat_lightning.quantize.recipe", "Packages import downward only"),
        ("modes/graph/nodes.py", "import qat_lightning.modes.fx.mode", "Inside modes"),
        ("cli/train.py", "import qat_lightning.cli.float_run", "No circles"),
        ("quantize/copies.py", "import lightning.pytorch", "Lightning is known to"),
        ("run/messages.py", "import hydra", "Hydra is known to"),
        ("run/messages.py", "import torch.ao.quantization", "torch.ao is known to"),
    ],
)
def test_a_planted_import_breaks_them(house: Path, file: str, planted: str, contract: str) -> None:
    path = house / PACKAGE.name / file
    path.write_text(f"{path.read_text()}\n{planted}\n")
    done = lint(house)
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    assert any(contract in line for line in broken), done.stdout


def test_a_newcomer_sees_few_rooms() -> None:
    rooms = {
        path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_") and path.suffix != ".typed"
    }
    assert len(rooms) <= ROOMS


def test_each_room_is_small_and_says_what_it_is_for() -> None:
    for init in PACKAGE.rglob("__init__.py"):
        files = [path for path in init.parent.glob("*.py") if path.name != init.name]
        assert len(files) <= FILES, init.parent
        assert ast.get_docstring(ast.parse(init.read_text())), init
