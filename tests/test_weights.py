from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat_lightning import prepare
from qat_lightning.cli.float_weights import load_weights
from qat_lightning.tasks.models import DigitsCNN


def network(seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return DigitsCNN(width=4, **options)


def prefixed(prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in network(1).state_dict().items()}


@pytest.mark.parametrize(
    "content",
    [
        prefixed(""),
        prefixed("module."),
        {"model": prefixed("")},
        {"state_dict": prefixed("network."), "epoch": 3, "callbacks": {}},
        {"state_dict": {**prefixed("network."), "val_accuracy.tp": torch.zeros(1)}},
    ],
    ids=["plain", "parallel", "torchvision", "lightning", "lightning-with-more"],
)
def test_every_layout_gives_the_same_network(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "file")
    loaded = network(2)
    load_weights(loaded, tmp_path / "file")
    for key, value in network(1).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "file")
    target = network(2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(target, tmp_path / "file")
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_another_network_is_refused(tmp_path: Path) -> None:
    content = network(1).state_dict()
    content["extra"] = content.pop("head.bias")
    refused(tmp_path, content, r"Missing: head\.bias\. Unexpected: extra\.")


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    refused(tmp_path, nn.Linear(2, 2).state_dict(), r"Missing: block.0.weight, .* and \d+ more\.")


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    content = network(1, num_classes=7).state_dict()
    refused(tmp_path, content, r"other shapes.*head.bias \(7,\) instead of \(10,\)")


def test_a_prepared_network_is_refused(tmp_path: Path) -> None:
    content = prepare(network(1)).state_dict()
    refused(tmp_path, content, "qat_lightning.load_qat_checkpoint")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {1: torch.zeros(1)}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    refused(tmp_path, content, "no state dict")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.pt"):
        load_weights(network(1), tmp_path / "nothing.pt")


@pytest.mark.parametrize("content", [b"", b"no weights", pickle.dumps(Path("x"), protocol=2)])
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="not a file of weights"):
        load_weights(network(1), tmp_path / "file")
