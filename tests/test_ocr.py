"""The example of text recognition and detection: its parts, and tiny runs of the whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from examples.ocr import boxes as geometry
from examples.ocr import recognition, strings
from examples.ocr.boxes import HMean, matches, targets, to_boxes
from examples.ocr.comparison import TASKS, Task, trainer
from examples.ocr.data import Lines, Pages, fixed_data, training_data
from qat_lightning import QuantizationAwareTraining, convert, export_onnx, load_runtime, prepare
from qat_lightning.export.runtime import RuntimeNetwork
from qat_lightning.export.structure import tensors_of
from qat_lightning.quantize.floating import is_int8
from qat_lightning.tasks.data.digits import load_digits
from tests.networks import sqnr, train_steps

ROOT = Path(__file__).parent.parent


def boxes(*sides: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(sides, dtype=torch.float).reshape(-1, 4)


@pytest.mark.parametrize("data", [Lines, Pages])
@pytest.mark.parametrize("split", strings.SPLITS)
def test_strings_are_written_with_the_digits_of_their_split(
    data: Any, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[bytes] = set()

    def recorded(digit: Tensor, height: float, width: float) -> Tensor:
        used.add(digit.numpy().tobytes())
        return resized(digit, height, width)

    resized = strings.resized
    monkeypatch.setattr(strings, "resized", recorded)
    for index in range(100):
        data(split)[index]
    own = {name: {image.numpy().tobytes() for image in strings.Pen(name).images} for name in strings.SPLITS}
    assert len(used) > 50
    assert used <= own.pop(split)
    assert not any(used & digits for digits in own.values())


def test_pens_share_no_digit_and_use_all() -> None:
    pens = {split: strings.Pen(split).images for split in strings.SPLITS}
    for split, images in pens.items():
        assert len(images) / 1797 == pytest.approx(strings.SPLITS[split], abs=0.01)
    different = {image.numpy().tobytes() for images in pens.values() for image in images}
    assert len(different) == len({image.numpy().tobytes() for image in load_digits()[0]}) == 1797


@pytest.mark.parametrize("data", [Lines, Pages])
def test_an_image_is_the_same_at_every_look_and_in_each_split_another(data: Any) -> None:
    (first, target), (again, same), (other, _) = data("train")[5], data("train")[5], data("test")[5]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, data("train")[6][0])
    assert torch.equal(target, same) if isinstance(target, Tensor) else target == same


def test_lines_hold_strings_of_three_to_six_digits() -> None:
    texts = [Lines("train")[index][1] for index in range(60)]
    assert {len(text) for text in texts} == {3, 4, 5, 6}
    assert {each for text in texts for each in text} == set("0123456789")


def test_boxes_of_a_page_lie_in_it_apart_from_each_other() -> None:
    pages = [Pages("test")[index] for index in range(30)]
    assert {1, 2, 3} <= {len(of_page) for _, of_page in pages} <= {1, 2, 3, 4}
    for image, of_page in pages:
        assert image.shape == (1, 96, 128)
        assert bool(((of_page >= 0) & (of_page <= torch.tensor([128, 96, 128, 96]))).all())
        overlaps = torchvision.ops.box_iou(of_page, of_page) - torch.eye(len(of_page))
        assert overlaps.abs().max() < 1e-6


def test_epochs_have_new_images_and_a_seed_names_them() -> None:
    def epochs(seed: int) -> list[list[str]]:
        data = training_data(Lines("train"), 40, seed)
        return [[text for _, texts in data for text in texts] for _ in range(2)]

    first, second = epochs(3)
    assert len(first) == 40
    assert first != second
    assert [first, second] == epochs(3) != epochs(4)


def test_a_path_of_ctc_loses_repetitions_and_then_blanks() -> None:
    path = torch.tensor([[0, 3, 3, 0, 3, 10, 10, 0, 0, 1], [0] * 10])  # a class is one more than its digit
    assert recognition.decode(nn.functional.one_hot(path, 11).float()) == ["2290", ""]
    assert recognition.encode(["29", "0"]).tolist() == [3, 10, 1]


def test_matches_pair_each_box_once_and_the_best_first() -> None:
    true = boxes((0, 0, 10, 10), (20, 0, 30, 10))
    assert matches(true, true) == 2
    assert matches(boxes((0, 0, 10, 9), (0, 0, 10, 8)), true) == 1  # both find the same
    assert matches(boxes((0, 0, 10, 4.9)), true) == 0
    assert matches(boxes((0, 0, 10, 5)), true) == 1
    assert matches(boxes(), true) == matches(true, boxes()) == 0


def test_hmean_counts_boxes_over_all_images() -> None:
    metric, one, two = HMean(), boxes((0, 0, 10, 10)), boxes((0, 0, 10, 10), (20, 0, 30, 10))
    metric.update([boxes()], [boxes()])
    assert metric.compute() == 0
    metric.update([one, two], [two, one])  # precision 2/3, recall 2/3
    assert float(metric.compute()) == pytest.approx(2 / 3)
    metric.update([boxes()], [two])  # precision 2/3, recall 2/5
    assert float(metric.compute()) == pytest.approx(2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))


def test_what_a_cell_is_to_predict_decodes_to_the_box_again() -> None:
    true = boxes((10, 20, 70, 44), (80, 60, 110, 70))
    positive, wanted = targets(torch.zeros(1, 24, 32), [true])
    middles = geometry.centres(positive)[positive[0].bool()]
    assert {tuple(box) for box in wanted[0][positive[0].bool()].tolist()} == {tuple(b) for b in true.tolist()}
    assert bool((middles[:, 0] >= 25).all())  # the middle half of the first
    points = geometry.centres(positive)
    sides = torch.cat([points - wanted[0, ..., :2], wanted[0, ..., 2:] - points], -1).clamp(min=1)
    distances = (sides / geometry.STRIDE).log().permute(2, 0, 1)[None]
    assert torch.allclose(to_boxes(positive, distances)[positive.bool()], wanted[positive.bool()], atol=1e-4)
    (found,) = geometry.decode(20 * positive - 10, distances)
    assert matches(found, true, 0.99) == len(found) == 2


def fitted(task: Task, folder: Path) -> tuple[Any, QuantizationAwareTraining]:
    module = task.module()
    qat = QuantizationAwareTraining(
        backend="onednn", keep_float=task.keep_float, output_dir=folder, export=["torch", "onnx"]
    )
    trainer(qat, max_epochs=2).fit(module, training_data(task.data("train"), 256, 0))
    return module.eval(), qat


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("name", TASKS)
def test_files_of_a_mixed_network_compute_what_was_trained(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    module, qat = fitted(task, tmp_path)
    assert qat.int8_module is not None
    layers = dict(qat.int8_module.get_submodule("model").named_modules())
    floats = [n for n, layer in layers.items() if type(layer) in (nn.Conv2d, nn.Linear, nn.LSTM)]
    assert floats == (["head.lstm", "head.linear"] if name == "recognition" else [])
    assert sum(map(is_int8, layers.values())) == {"recognition": 6, "detection": 10}[name]

    data = fixed_data(task.data("test"), 16)
    (images, _), *_ = data
    with torch.no_grad():
        expected = tensors_of(module.model(images))
        for path in qat.exported:
            shipped: Any = qat.shipped(task.module(), path)
            for want, got in zip(expected, tensors_of(shipped.model(images)), strict=True):
                assert sqnr(want, got) > 30
            (scores,) = trainer().test(shipped, data, verbose=False)
            assert all(-10 < value <= 1 for value in scores.values())
    assert [path.name for path in qat.exported] == ["int8.pt", "int8.onnx"]
    graph = load_runtime(qat.exported[1])
    assert isinstance(graph, RuntimeNetwork)
    in_float = graph.runtime.float_operations()
    assert "Conv" not in in_float
    assert in_float["LSTM"] == (name == "recognition")


def test_a_torchvision_trunk_in_int8_reads_into_a_float_recurrent_head(tmp_path: Path) -> None:
    trunk = torchvision.models.mobilenet_v2(width_mult=0.25).features[:4]
    network = nn.Sequential(trunk, recognition.Head(8 * 8, 16))  # 8 channels in 8 rows
    images = torch.randn(8, 3, 32, 64)
    prepared = prepare(network, backend="onednn", keep_float=[recognition.Head])
    train_steps(prepared, ((images,), {}))
    int8 = convert(prepared)
    assert not any(is_int8(m) for m in int8.get_submodule("1").modules())
    assert sum(is_int8(m) for m in int8.get_submodule("0").modules()) >= 9
    with torch.no_grad():
        expected = prepared(images)
        assert sqnr(expected, int8(images)) > 30
        file = export_onnx(prepared, tmp_path / "int8.onnx", (images[:2],))
        assert sqnr(expected, load_runtime(file)(images)) > 30


@pytest.mark.slow
def test_the_script_trains_and_scores_every_form(tmp_path: Path) -> None:
    tiny = ["--epochs=1", "--tuning=1", "--images=64", "--tested=16", "--largest-loss=100"]
    command = [sys.executable, "-m", "examples.ocr", *tiny, f"--folder={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for form in ("float", "int8, not trained", "fake-quant", "int8", "int8 in ONNX Runtime"):
        assert len(re.findall(rf"│ {form} +│", done.stdout)) == 2
    assert not done.stderr.strip()
    assert len(list(tmp_path.rglob("int8.onnx"))) == len(list(tmp_path.rglob("int8.pt"))) == 2
