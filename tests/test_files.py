"""Int8 files and QAT checkpoints: read back bit for bit, and refused with words where they do not fit."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qat_lightning import (
    Int8FileError,
    QuantizationAwareTraining,
    RecipeMismatchError,
    convert,
    load_int8,
    load_qat_checkpoint,
    prepare,
    save_int8,
)
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from tests.networks import CASES, Case, ConvBnRelu, Residual, Stubbed, leaves, same_state, train_steps
from tests.runs import TinyModule, dataset, trainer
from tests.test_prepare import OWN


def int8_of(network: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    prepared = prepare(network, **options)
    train_steps(prepared, ((x,), {}))
    return convert(prepared)


@pytest.fixture
def x() -> Tensor:
    return dataset(16).tensors[0]


load_unverified = partial(load_int8, verify=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_outputs_are_the_same_bit_for_bit(case: Case, tmp_path: Path) -> None:
    prepared = prepare(case.build(), mode=case.mode)
    args, kwargs = inputs = case.inputs()
    train_steps(prepared, inputs)
    int8 = convert(prepared)
    path = save_int8(int8, tmp_path / "new" / "folder" / "int8.pt")
    assert sorted(p.name for p in path.parent.iterdir()) == ["int8.pt", "manifest.json"]
    torch.manual_seed(5)
    loaded = load_int8(path, case.build())
    ours, theirs = leaves(int8(*args, **kwargs)), leaves(loaded(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not loaded.training
    assert same_state(int8, loaded) == []


def test_a_file_is_about_as_small_as_its_weights(tmp_path: Path, x: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 400))
    size = sum(p.numel() for p in network.parameters())
    path = save_int8(int8_of(network, x), tmp_path / "int8.pt")
    assert size < path.stat().st_size < 1.2 * size


@pytest.mark.parametrize(
    "options", [{"keep_float": ["fc"]}, {"backend": "qnnpack"}, {"replace_relu6": False}]
)
@pytest.mark.parametrize("build", [Residual, Stubbed])
def test_the_recipe_travels_with_the_file(
    tmp_path: Path, x: Tensor, build: type[nn.Module], options: dict[str, Any]
) -> None:
    if build is Stubbed and "replace_relu6" in options:
        options = {**options, "fuse": [["conv1", "bn1"], ["conv2", "bn2", "relu2"]]}
    int8 = int8_of(build(), x, **options)
    loaded = load_int8(save_int8(int8, tmp_path / "int8.pt"), build())
    assert torch.equal(int8(x), loaded(x))


@pytest.mark.parametrize("build", [Residual, Stubbed])
def test_a_file_of_a_lightning_module_fits_the_bare_network(tmp_path: Path, build: type[nn.Module]) -> None:
    qat = QuantizationAwareTraining()
    trainer(tmp_path, qat, max_epochs=1).fit(TinyModule(build()))
    assert qat.int8_module is not None
    assert qat.int8_path is not None
    x = dataset(16).tensors[0]
    whole, bare = load_int8(qat.int8_path, TinyModule(build())), load_int8(qat.int8_path, build())
    assert torch.equal(qat.int8_module(x), whole(x))
    assert torch.equal(qat.int8_module(x), bare(x))


@pytest.mark.parametrize("build", [Residual, Stubbed])
def test_ones_own_qconfig_has_to_be_passed_again(tmp_path: Path, x: Tensor, build: type[nn.Module]) -> None:
    int8 = int8_of(build(), x, qconfig=OWN)
    path = save_int8(int8, tmp_path / "int8.pt")
    assert torch.equal(load_int8(path, build(), qconfig=OWN)(x), int8(x))
    with pytest.raises(RecipeMismatchError, match=r"needs that QConfig again.*received 'default'.*qconfig="):
        load_int8(path, build())
    path = save_int8(int8_of(build(), x), path)
    with pytest.raises(RecipeMismatchError, match="was prepared with 'default', but received 'sha256"):
        load_int8(path, build(), qconfig=OWN)


def test_a_truncated_file(tmp_path: Path, x: Tensor) -> None:
    path = save_int8(int8_of(Residual(), x), tmp_path / "int8.pt")
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:length])
        with pytest.raises(Int8FileError, match=r"int8\.pt cannot be read: it is damaged, truncated"):
            load_unverified(path, Residual())


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(os.urandom(1000))
    with pytest.raises(Int8FileError, match="cannot be read"):
        load_unverified(path, Residual())
    for content in (Residual().state_dict(), [1, 2], {"format": "another"}):
        torch.save(content, path)
        with pytest.raises(
            Int8FileError, match=r"is not an int8 file of qat-lightning.*use load_qat_checkpoint"
        ):
            load_unverified(path, Residual())
    with pytest.raises(FileNotFoundError, match=r"There is no file .*missing.pt"):
        load_unverified(tmp_path / "missing.pt", Residual())


class Explosive:
    """Runs code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("read", [load_unverified, load_qat_checkpoint])
@pytest.mark.parametrize("plain", [False, True])
def test_code_in_a_file_is_not_run(tmp_path: Path, read: Any, plain: bool) -> None:
    path, trace = tmp_path / "bad.pt", tmp_path / "trace"
    if plain:
        path.write_bytes(pickle.dumps(Explosive(trace)))
    else:
        torch.save({"format": "qat-lightning int8", "state_dict": {}, "more": Explosive(trace)}, path)
    with pytest.raises(Int8FileError, match="objects other than tensors and plain values"):
        read(path, Residual())
    assert not trace.exists()


def test_a_file_of_another_network(tmp_path: Path, x: Tensor) -> None:
    path = save_int8(int8_of(Residual(), x), tmp_path / "int8.pt")
    with pytest.raises(Int8FileError, match="does not fit ConvBnRelu"):
        load_int8(path, ConvBnRelu())
    with pytest.raises(
        Int8FileError, match=r"'fc\.weight' has the shape \(4, 16\) in the module, but \(4, 8"
    ):
        load_int8(path, Residual(width=16))
    with pytest.raises(Int8FileError, match="does not fit Stubbed"):
        load_int8(path, Stubbed())


def test_the_content_of_a_file_is_damaged(tmp_path: Path, x: Tensor) -> None:
    path = save_int8(int8_of(Residual(), x), tmp_path / "int8.pt")
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    torch.save({**content, "state_dict": {k: v for k, v in state.items() if "recipe" in k}}, path)
    with pytest.raises(Int8FileError, match="does not fit Residual"):
        load_unverified(path, Residual())
    without_recipe = {k: v for k, v in state.items() if "recipe" not in k}
    garbage = {**state, "_qat_recipe": torch.zeros(3, dtype=torch.uint8)}
    for damaged in ({"state_dict": without_recipe}, {"state_dict": garbage}, {}):
        torch.save({"format": content["format"], **damaged}, path)
        with pytest.raises(Int8FileError, match=r"int8\.pt is damaged: it holds no readable recipe"):
            load_unverified(path, Residual())


def test_only_int8_modules_are_saved(tmp_path: Path) -> None:
    for network in (Residual(), prepare(Residual())):
        with pytest.raises(
            ValueError, match=r"Residual holds no int8 network\. Call convert\(module\) first"
        ):
            save_int8(network, tmp_path / "int8.pt")
    assert list(tmp_path.iterdir()) == []


READ = """
import sys, torch
from qat_lightning import convert, load_qat_checkpoint
from tests.networks import Residual, Stubbed
from tests.runs import TinyModule
checkpoint, inputs, outputs, kind, bare = sys.argv[1:]
network = {"Residual": Residual, "Stubbed": Stubbed}[kind]()
prepared = load_qat_checkpoint(checkpoint, network if bare == "True" else TinyModule(network))
x = torch.load(inputs)
torch.save((prepared(x).detach(), convert(prepared)(x)), outputs)
"""


@pytest.mark.parametrize(
    ("network", "bare"),
    [
        (Residual, True),
        pytest.param(Residual, False, marks=pytest.mark.slow),
        pytest.param(Stubbed, True, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_read_in_a_new_process(tmp_path: Path, network: type[nn.Module], bare: bool) -> None:
    module = TinyModule(network())
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    qat = QuantizationAwareTraining(convert="last")
    trainer(tmp_path, qat, checkpoint, max_epochs=2).fit(module)
    x = dataset(16, seed=2).tensors[0]
    torch.save(x, tmp_path / "x.pt")
    arguments = [str(tmp_path / name) for name in ("last.ckpt", "x.pt", "y.pt")]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", READ, *arguments, network.__name__, str(bare)],
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    fake, int8 = torch.load(tmp_path / "y.pt")
    assert torch.equal(fake, module.eval()(x))
    assert torch.equal(int8, qat.int8_module(x))  # type: ignore[misc]


def test_a_checkpoint_keeps_the_phase(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    qat = QuantizationAwareTraining(fake_quant_from=1, freeze_observers_at=1)
    trainer(tmp_path, qat, checkpoint, max_epochs=2).fit(TinyModule())
    flags = []
    for epoch in range(2):
        prepared = load_qat_checkpoint(tmp_path / f"epoch={epoch}.ckpt", TinyModule())
        child = next(child for _, child in fake_quantizes(prepared))
        flags.append((bool(child.fake_quant_enabled), bool(child.observer_enabled)))
    assert flags[1] == (True, False)
    assert flags[0][0] is False


def test_a_float_checkpoint_is_no_qat_checkpoint(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="float")
    trainer(tmp_path, checkpoint, max_epochs=1).fit(TinyModule())
    with pytest.raises(ValueError, match=r"no quantization recipe is in it.*TinyModule.load_from_checkpoint"):
        load_qat_checkpoint(tmp_path / "float.ckpt", TinyModule())


def test_an_int8_file_is_no_checkpoint(tmp_path: Path, x: Tensor) -> None:
    path = save_int8(int8_of(Residual(), x), tmp_path / "int8.pt")
    with pytest.raises(ValueError, match="load_int8"):
        load_qat_checkpoint(path, Residual())


def test_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, QuantizationAwareTraining(), checkpoint, max_epochs=1).fit(TinyModule())
    with pytest.raises(RecipeMismatchError, match="differ"):
        load_qat_checkpoint(tmp_path / "last.ckpt", TinyModule(ConvBnRelu()))
