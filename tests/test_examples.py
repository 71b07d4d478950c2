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


def test_readme_snippets_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 3
    scope: dict[str, object] = {"__name__": "readme"}
    for snippet in snippets[1:]:  # the first is the second's outline
        exec(compile(snippet, "README.md", "exec"), scope)  # our own text
    assert list(tmp_path.rglob("int8.pt"))
