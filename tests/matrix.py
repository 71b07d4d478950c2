"""Runs the tests on other versions of Python and PyTorch, each in an environment of its own.

    python -m tests.matrix                                  # every row of ROWS, the fast tests
    python -m tests.matrix --rows 3.13 --tests tests/test_relu6.py tests/test_callback.py
    python -m tests.matrix --pip-options="--index-url …"    # for a registry of your own

An environment takes about 6 GB and is deleted after its row. A row whose interpreter is not installed, or for
whose Python there is no wheel, is said to be left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """What is installed in one environment.

    Attributes:
        python: Version of Python, as in the name of its interpreter.
        packages: What pip is asked for beside the project.
    """

    python: str
    packages: tuple[str, ...]

    def __str__(self) -> str:
        return f"Python {self.python}, {', '.join(self.packages)}"


NEWEST = ("torch==2.15.0", "torchvision==0.29.2")
ROWS = (
    Row("3.11", NEWEST),
    Row("3.13", NEWEST),
    Row("3.14", NEWEST),
    Row("3.11", ("torch==2.11.0", "torchvision==0.26.0", "lightning==2.6.1")),
)


def interpreter(version: str) -> str | None:
    """The interpreter of a version of Python: on the path, or one of pyenv's."""
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
        return found
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = sorted(pyenv.glob(f"versions/{version}*/bin/python{version}"))
    return str(candidates[-1]) if candidates else None


def run(row: Row, tests: list[str], pip_options: list[str]) -> str:
    """Installs, tests, and says in a few words what came of it."""
    python = interpreter(row.python)
    if python is None:
        return "left out: no interpreter"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own = str(Path(folder) / "bin/python")
        pip = [own, "-m", "pip", "install", "--quiet", *pip_options]
        for packages in (list(row.packages), ["--editable", f"{ROOT}[dev]", *row.packages]):
            done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip failed"
                return f"left out: {last}"
        command = [own, "-m", "pytest", "-q", "--numprocesses", "auto", "--maxprocesses", "4", *tests]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(done.stdout[-8000:])
    summary = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|error).*?)(?: =+)?$", done.stdout, re.MULTILINE)
    return summary[-1] if summary else f"exit status {done.returncode}"


def main() -> int:
    """Runs the rows and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="versions of Python whose rows to run; all by default")
    parser.add_argument("--tests", nargs="+", default=[], help="files of tests; the fast tests by default")
    parser.add_argument("--pip-options", default="", help="options for every pip install")
    arguments = parser.parse_args()
    table = Table("environment", "tests")
    failed = False
    for row in ROWS:
        if arguments.rows is None or row.python in arguments.rows:
            result = run(row, arguments.tests, shlex.split(arguments.pip_options))
            failed |= not result.startswith("left out") and ("failed" in result or "passed" not in result)
            table.add_row(str(row), result)
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
