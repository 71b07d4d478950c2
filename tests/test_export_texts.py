"""Files of networks that read texts: any length, and outputs that are dataclasses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import export_onnx, export_openvino, load_runtime, prepare
from qat_lightning.export.fields import Fields, as_fields
from tests.captured import CASES, Output
from tests.networks import sqnr, train_steps
from tests.test_capture import trained

EXPORTS = {"int8.onnx": export_onnx, "int8.xml": export_openvino}


def shapes(runtime: Any) -> list[tuple[int | None, ...]]:
    return [each.shape for each in runtime.runtime.signatures]


@pytest.mark.parametrize("name", ["int8.onnx", pytest.param("int8.xml", marks=pytest.mark.slow)])
def test_a_file_takes_texts_of_any_length_and_returns_fields(name: str, tmp_path: Path) -> None:
    case = CASES["attention"]
    prepared: Any = trained(case)
    runtime: Any = load_runtime(EXPORTS[name](prepared, tmp_path / name, case.example))
    assert shapes(runtime) == [(None, None), (None, None)]
    for inputs in (case.example, case.other):
        found = runtime(**inputs)
        assert sqnr(prepared(**inputs).logits, found.logits) > 30
        assert found["logits"] is found[0] is found.logits
        assert found.features is None
    assert "captured" not in runtime.runtime.structure  # the class need not exist where the file runs
    assert isinstance(prepared(**case.example), Output)


class Table(nn.Module):
    """Reads exactly six integers in a row, and an image of any batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(10, 4), nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(24, 4)

    def forward(self, row: Tensor, image: Tensor) -> Tensor:
        return self.fc(self.embedding(row).flatten(1)) + self.conv(image).mean((2, 3))


def test_floats_keep_their_sizes_and_a_network_refuses_a_size_that_it_cannot_read(tmp_path: Path) -> None:
    prepared = prepare(Table(), example_inputs=(torch.zeros(2, 6).long(), torch.randn(2, 1, 8, 8)))
    row, image = torch.randint(10, (16, 6)), torch.randn(16, 1, 8, 8)
    train_steps(prepared, ((row, image), {}))
    runtime = load_runtime(export_onnx(prepared, tmp_path / "int8.onnx", (row[:2], image[:2])))
    assert shapes(runtime)[1] == (None, 1, 8, 8)
    assert sqnr(prepared.eval()(row, image), runtime(row, image)) > 30
    with pytest.raises(Exception, match=r"(?i)dimension"):
        runtime(row[:, :5], image)


def test_fields() -> None:
    x = torch.ones(1)
    fields = as_fields([Output(x, None), {"a": Output(x, x)}])
    assert fields == [{"logits": x}, {"a": {"logits": x, "features": x}}]
    first, second = fields[0], fields[1]["a"]
    assert (first.features, second.features, second[-1], second[:1]) == (None, x, x, (x,))
    with pytest.raises(AttributeError, match=r"has the fields logits, and none of the name 'scores'"):
        _ = first.scores
    assert isinstance(copy.deepcopy(second), Fields)
