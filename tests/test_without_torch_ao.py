"""A traced network trains, resumes and becomes a file without an import of `torch.ao` by this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import without_torch_ao_script
from tests.networks import sqnr

NEED_TORCH_AO = ("qat_lightning.modes.eager.", "qat_lightning.modes.native.")


@pytest.mark.slow
def test_a_captured_network_needs_no_torch_ao(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", without_torch_ao_script.__name__, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    fake_quant, runtime = torch.load(tmp_path / "outputs.pt")
    assert sqnr(fake_quant, runtime) > 40
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said["refused"]) == 2  # the refusal works: these two need torch.ao
    assert not [name for name in said["loaded"] if name.startswith(NEED_TORCH_AO)]


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("import torch.ao.quantization", True),
        ("from torch import ao", True),
        ("from torch.ao import nn", True),
        ("import torch", False),
        ("from torch import nn", False),
    ],
)
def test_what_is_refused(line: str, refused: bool) -> None:
    space = {
        "__name__": "qat_lightning.planted",
        "__builtins__": {"__import__": without_torch_ao_script.refuse_torch_ao},
    }
    if refused:
        with pytest.raises(ImportError, match=r"qat_lightning\.planted imports torch"):
            exec(line, space)
    else:
        exec(line, space)
    exec(line, {**space, "__name__": "tests.planted"})
