"""The examples and the README's Python snippets run, each in an empty folder as a user would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minimal", "torchvision_quantizable"])
def test_example_trains_and_scores_the_int8_module(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "checkpoints" / "int8.pt").is_file()
    assert "Test metric" in done.stdout
    assert "torch.ao" not in done.stderr
    assert re.search(r"Prepared model: \d+ layers for", done.stderr)
