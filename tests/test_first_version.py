"""Files that version 0.1.0 wrote keep loading, and give what they gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat_lightning import convert, latest_checkpoint, load_int8, load_qat_checkpoint
from tests.first_version import FOLDER, NETWORKS, STEPS, Module, inputs, qat
from tests.networks import sqnr
from tests.runs import trainer

LEAST = 35.0
NEAR = 20.0
"""In dB: another processor or version of PyTorch rounds some activations to the neighbouring integer."""

OUTPUTS: dict[str, dict[str, Tensor]] = torch.load(FOLDER / "outputs.pt", weights_only=True)

pytestmark = [
    pytest.mark.parametrize("mode", NETWORKS),
    pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning"),
]


def test_the_int8_file(mode: str) -> None:
    for module in (Module(NETWORKS[mode]()), NETWORKS[mode]()):
        int8 = load_int8(FOLDER / f"{mode}-int8.pt", module)
        assert sqnr(OUTPUTS[mode]["int8"], int8(inputs())) > LEAST


def test_the_checkpoint_is_read(mode: str) -> None:
    prepared = load_qat_checkpoint(FOLDER / f"{mode}.ckpt", Module(NETWORKS[mode]()))
    fake_quant = prepared(inputs()).detach()
    assert sqnr(fake_quant, convert(prepared)(inputs())) > LEAST


def test_a_run_goes_on_from_the_checkpoint(mode: str, tmp_path: Path) -> None:
    callback, module = qat(), Module(NETWORKS[mode]())
    options: dict[str, Any] = {"enable_checkpointing": False, "max_epochs": 3}
    runner = trainer(tmp_path, callback, **options)
    runner.fit(module, ckpt_path=FOLDER / f"{mode}.ckpt", weights_only=True)
    assert runner.global_step == 3 * STEPS
    assert callback.int8_module is not None
    fake_quant = module.eval()(inputs()).detach()
    assert sqnr(fake_quant, callback.int8_module(inputs())) > LEAST
    # That version froze the grids of weights with the observers, so that it ended near, not here.
    assert sqnr(OUTPUTS[mode]["fake_quant"], fake_quant) > NEAR


def test_the_files_are_small_and_say_nothing_of_where_they_were_written(mode: str) -> None:
    for path in FOLDER.iterdir():
        assert path.stat().st_size < 100_000
        content = path.read_bytes()
        assert not any(word in content for word in (b"/tmp", b"/home", b"/root", b"/work"))
    assert latest_checkpoint(FOLDER) is not None
    assert len(list(FOLDER.iterdir())) == 2 * len(NETWORKS) + 2
