from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
LAZY = ("hydra", "sklearn", "timm", "onnx", "onnxruntime", "onnxscript")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "project"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("qat_lightning", "conf"):
        shutil.copytree(ROOT / name, source / name)
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(source / "dist"))
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--target", str(target))
    return target


def pip(*arguments: str) -> None:
    options = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def python(folder: Path, *arguments: str, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else dict(os.environ)
    line = [sys.executable, *arguments]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"qat_lightning/py.typed"}
    for path in (ROOT / "qat_lightning").rglob("*.py"):
        expected.add(str(path.relative_to(ROOT)))
    for pattern in ("*.py", "*.yaml"):
        for path in (ROOT / "conf").rglob(pattern):
            expected.add(str("qat_lightning" / path.relative_to(ROOT)))
    assert expected <= names
    assert not any(name.startswith(("tests", "conf", "examples")) for name in names)


def test_wheel_runs_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    where = "import qat_lightning.conf; print(qat_lightning.__file__, qat_lightning.conf.__file__)"
    for file in python(tmp_path, "-c", where, path=installed).split():
        assert Path(file).is_relative_to(installed)
    shown = python(tmp_path, "-m", "qat_lightning", "--cfg", "job", path=installed)
    assert "_target_: qat_lightning.QuantizationAwareTraining" in shown
    assert list(tmp_path.iterdir()) == []
    short = ["experiment=digits_demo", "trainer.max_epochs=1", "hydra.run.dir=run"]
    python(tmp_path, "-m", "qat_lightning", *short, path=installed)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["int8_accuracy"] is not None
    assert Path(metrics["int8_path"]) == tmp_path / "run" / "int8.pt"


def test_import_leaves_optional_packages_alone(tmp_path: Path) -> None:
    code = f"import sys, qat_lightning; print([m for m in {LAZY} if m in sys.modules])"
    assert python(tmp_path, "-c", code) == "[]\n"
