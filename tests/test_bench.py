"""Exported files measured side by side, by `qat-bench` and by what it is made of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qat_lightning import (
    Int8FileError,
    convert,
    export_onnx,
    export_openvino,
    load_runtime,
    prepare,
    save_int8,
)
from qat_lightning.base.quiet import quiet_exporters
from qat_lightning.cli import bench
from qat_lightning.export.load import load_graph
from qat_lightning.export.runtime import Signature
from qat_lightning.report.content import Machine, Speed
from tests.networks import TwoInputs, images, train_steps
from tests.processes import ROOT
from tests.runs import TinyModule
from tests.test_runtime import Island

CONFIG = "classifier:\n  _target_: {}\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a network in every format, and the float network beside it."""
    torch.manual_seed(0)
    folder, module = tmp_path_factory.mktemp("exported"), TinyModule()
    with quiet_exporters():
        import openvino

        batch = ({0: torch.export.Dim.AUTO},)
        graph, args = folder / "float.onnx", (images(),)
        torch.onnx.export(module.model.eval(), args, graph, dynamo=True, verbose=False, dynamic_shapes=batch)
        openvino.save_model(openvino.convert_model(graph), folder / "float.xml", compress_to_fp16=False)
    module.model = prepare(module.model)
    train_steps(module.model, ((images(),), {}))
    save_int8(convert(module), folder / "int8.pt")
    export_onnx(module.model, folder / "int8.onnx", (images(),))
    export_openvino(module.model, folder / "int8.xml", (images(),))
    (folder / "config.yaml").write_text(CONFIG.format("tests.runs.TinyModule"))
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to alter."""
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture
def qat_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command in this process; returns its exit status, output and error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qat-bench", *map(str, arguments), "--seconds", "0"])
        return bench.main(), *capsys.readouterr()

    return run


def graph(path: Path, *inputs: Signature) -> Path:
    """An ONNX file that returns what it takes."""
    kinds = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
    taken, given = (
        [helper.make_tensor_value_info(prefix + s.name, kinds[s.dtype], s.shape) for s in inputs]
        for prefix in ("", "same_")
    )
    nodes = [helper.make_node("Identity", [s.name], ["same_" + s.name]) for s in inputs]
    model = helper.make_model(helper.make_graph(nodes, "test", taken, given), ir_version=10)
    model.opset_import[0].version = 20
    onnx.save(model, path)
    return path


# The command


def test_every_kind_of_file_side_by_side(
    exported: Path, tmp_path: Path, qat_bench: Callable[..., Any]
) -> None:
    names = ["float.onnx", "int8.onnx", "float.xml", "int8.xml", "int8.pt"]
    files, threads = [exported / name for name in names], torch.get_num_threads()
    options = ["--no-verify", "--threads", 1, "--batch", 1, 3, "--json", tmp_path / "new" / "speeds.json"]
    status, shown, error = qat_bench(*files, *options)
    assert (status, error) == (0, "")
    assert torch.get_num_threads() == threads
    said = json.loads((tmp_path / "new" / "speeds.json").read_text())
    assert [each["name"] for each in said["files"]] == names
    assert [each["int8"] for each in said["files"]] == [False, True, False, True, True]
    assert said["files"][1]["bytes"] == (exported / "int8.onnx").stat().st_size
    parts = [exported / "int8.xml", exported / "int8.bin"]
    assert said["files"][3]["bytes"] == sum(part.stat().st_size for part in parts)
    assert said["files"][1]["float_operations"] == {}
    assert [(each["name"], each["batch"]) for each in said["speeds"]] == [
        (n, b) for b in (1, 3) for n in names
    ]
    for each in said["speeds"]:
        assert each["milliseconds"] > 0
        assert each["per_second"] == pytest.approx(1000 * each["batch"] / each["milliseconds"])
        assert (each["speedup"] is None) == (each["name"] == "float.onnx")
    assert said["machine"]["threads"] == 1
    assert f"{said['machine']['cpu']} (" in shown
    for part in (*names, "PyTorch", "ONNX Runtime", "OpenVINO", "1 thread on"):
        assert part in shown
    assert "in float between int8 layers" not in shown


@pytest.mark.slow
def test_as_a_command(exported: Path) -> None:
    line = [sys.executable, "-m", "qat_lightning.cli.bench", "--seconds", "0", "int8.onnx", "int8.pt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the configuration names a class of the tests
    done = subprocess.run(line, cwd=exported, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("int8.pt") == 3  # batches 1, 8 and 32
    done = subprocess.run(
        [*line, "float.onnx"], cwd=exported, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qat-bench: error: manifest.json does not list float.onnx")
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_altered_or_has_no_manifest(folder: Path, qat_bench: Callable[..., Any]) -> None:
    for name in ("int8.onnx", "int8.bin", "int8.pt"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        status, _, error = qat_bench(folder / name.replace(".bin", ".xml"))
        assert status == 1
        assert "is not the file that was exported" in error
        (folder / name).write_bytes(whole)
    (folder / "manifest.json").unlink()
    status, _, error = qat_bench(folder / "int8.onnx")
    assert status == 1
    assert "has no manifest.json" in error
    assert "or pass --no-verify to read it unchecked" in error
    assert qat_bench(folder / "int8.onnx", "--no-verify")[0] == 0
    (folder / "int8.onnx").write_bytes(b"no graph")
    status, _, error = qat_bench(folder / "int8.onnx", "--no-verify")
    assert (status, error.count("\n")) == (1, 1)
    assert "ONNX Runtime cannot read the file" in error


def test_files_that_cannot_be_measured(exported: Path, tmp_path: Path, qat_bench: Callable[..., Any]) -> None:
    for name, words in (("none.onnx", "There is no file"), ("int8.h5", "qat-bench measures .onnx")):
        status, _, error = qat_bench(tmp_path / name)
        assert status == 1
        assert words in error


def test_a_missing_extra(
    exported: Path, qat_bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat_lightning.export.extras.find_spec", lambda name: None)
    for suffix, extra in (("onnx", "onnx"), ("xml", "openvino")):
        status, _, error = qat_bench(exported / f"int8.{suffix}")
        assert status == 1
        assert f'pip install "qat-lightning[{extra}]"' in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "must be a whole number from 1, but received '0'"),
        (["--threads", "two"], "must be a whole number from 1, but received 'two'"),
        (["--shape", "3x2"], "must be like 3,224,224, but received '3x2'"),
        (["--seconds", "-1"], "must be a number of seconds, but received '-1'"),
        (["--seconds", "nan"], "must be a number of seconds, but received 'nan'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qat-bench", "int8.onnx", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert words in capsys.readouterr().err


# Inputs


def test_files_of_different_inputs(tmp_path: Path, qat_bench: Callable[..., Any]) -> None:
    one = graph(tmp_path / "one.onnx", Signature("x", torch.float32, (None, 3, 8, 8)))
    for shape, dtype in (((None, 3, 9, 8), torch.float32), ((None, 3, 8, 8), torch.int64)):
        other = graph(tmp_path / "other.onnx", Signature("x", dtype, shape))
        status, _, error = qat_bench(one, other, "--no-verify")
        assert status == 1
        assert "one.onnx takes x float32[?, 3, 8, 8], but " in error
        assert "measure these one by one" in error


def test_dimensions_that_files_leave_open(tmp_path: Path, qat_bench: Callable[..., Any]) -> None:
    ids, mask = (Signature(name, torch.int64, (None, None)) for name in ("ids", "mask"))
    path = graph(tmp_path / "open.onnx", ids, mask)
    status, _, error = qat_bench(path, "--no-verify")
    assert status == 1
    assert "takes ids int64[?, ?], where ? can be any size. Pass the sizes" in error
    assert qat_bench(path, "--no-verify", "--shape", "16")[0] == 0
    status, _, error = qat_bench(path, "--no-verify", "--shape", "16,2")
    assert status == 1
    assert "but received --shape 16,2" in error
    known = graph(tmp_path / "known.onnx", *(each._replace(shape=(None, 16)) for each in (ids, mask)))
    assert qat_bench(path, known, "--no-verify")[0] == 0  # one says it for both


def test_a_batch_that_is_fixed(tmp_path: Path, qat_bench: Callable[..., Any]) -> None:
    path = graph(tmp_path / "fixed.onnx", Signature("x", torch.float32, (4, 3)))
    target = tmp_path / "speeds.json"
    assert qat_bench(path, "--no-verify", "--json", target)[0] == 0
    assert [each["batch"] for each in json.loads(target.read_text())["speeds"]] == [4]
    status, _, error = qat_bench(path, "--no-verify", "--batch", "1", "8")
    assert status == 1
    assert "so only a batch of 4, but received --batch 1 8" in error


# Files of PyTorch, which hold no graph


def test_a_pt_file_needs_the_configuration_of_its_run(folder: Path, qat_bench: Callable[..., Any]) -> None:
    (folder / ".hydra").mkdir()
    (folder / "config.yaml").rename(folder / ".hydra" / "config.yaml")
    assert qat_bench(folder / "int8.pt")[0] == 0
    (folder / ".hydra" / "config.yaml").write_text(CONFIG.format("tests.networks.Nowhere"))
    status, _, error = qat_bench(folder / "int8.pt")
    assert (status, error.count("\n")) == (1, 1)
    assert "Nowhere" in error
    for content in ("trainer: cpu", "- a list"):
        (folder / "config.yaml").write_text(content)
        status, _, error = qat_bench(folder / "int8.pt")
        assert status == 1
        assert "from the config.yaml that qat-train writes beside it, but there is no config.yaml" in error


def test_a_pt_file_takes_what_its_graphs_say_or_a_shape(folder: Path, qat_bench: Callable[..., Any]) -> None:
    assert qat_bench(folder / "int8.pt", "--shape", "3,16,16")[0] == 0
    (folder / "int8.onnx").unlink()
    assert qat_bench(folder / "int8.pt")[0] == 0  # the IR
    (folder / "int8.xml").unlink()
    status, _, error = qat_bench(folder / "int8.pt")
    assert status == 1
    assert "Pass the shape of an input without the batch, as in --shape 3,224,224" in error
    status, _, error = qat_bench(folder / "int8.pt", "--shape", "5,5")
    assert (status, error.count("\n")) == (1, 1)
    assert "PyTorch cannot run it on inputs that it should take" in error


def test_inputs_by_name(tmp_path: Path, qat_bench: Callable[..., Any]) -> None:
    prepared, inputs = prepare(TwoInputs()), {"x": images(), "extra": torch.randn(16, 5)}
    train_steps(prepared, ((), inputs))
    save_int8(convert(prepared), tmp_path / "int8.pt")
    export_onnx(prepared, tmp_path / "int8.onnx", inputs)
    (tmp_path / "config.yaml").write_text(CONFIG.format("tests.networks.TwoInputs"))
    status, _, error = qat_bench(tmp_path / "int8.onnx", tmp_path / "int8.pt")
    assert (status, error) == (0, "")


# The notes


def test_a_busy_machine_is_spoken_of() -> None:
    calm, busy = (Speed("a", "PyTorch", 1, 4.0, spread) for spread in (0.5, 3.0))
    idle = Machine("CPU", ("avx_vnni",), 2, 2)
    assert bench._notes([calm], {}, idle) == []
    (note,) = bench._notes([calm, busy], {}, idle)
    assert "something else used the CPU" in note


# What runs in float


@pytest.mark.slow
def test_a_part_that_was_kept_float_runs_in_float(tmp_path: Path) -> None:
    prepared = prepare(Island(), keep_float=["middle"])
    train_steps(prepared, ((images(),), {}))
    for export, suffix, convolution in (
        (export_onnx, "onnx", "Conv"),
        (export_openvino, "xml", "Convolution"),
    ):
        runtime = load_graph(export(prepared, tmp_path / f"int8.{suffix}", (images(),)))
        assert runtime.int8
        found = runtime.float_operations()
        assert found[convolution] + found["FusedConv"] == 1, found  # with or without its tanh
        assert found.total() <= 3  # and a pooling


def test_what_runs_in_float_is_said(tmp_path: Path, qat_bench: Callable[..., Any]) -> None:
    prepared = prepare(Island(), keep_float=["middle"])
    train_steps(prepared, ((images(),), {}))
    path = export_onnx(prepared, tmp_path / "int8.onnx", (images(),))
    status, shown, _ = qat_bench(path, "--batch", 1)
    assert status == 0
    assert "in float between int8 layers" in shown


def test_float_is_float_everywhere(exported: Path) -> None:
    for name in ("float.onnx", "float.xml"):
        runtime = load_graph(exported / name, verify=False)
        assert not runtime.int8
        assert runtime.float_operations().total() >= 4
    network: Any = load_runtime(exported / "float.xml", verify=False)
    assert network.runtime._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def test_signatures(exported: Path) -> None:
    for name in ("int8.onnx", "int8.xml"):
        assert load_graph(exported / name).signatures == [Signature("x", torch.float32, (None, 3, 12, 12))]


def test_a_file_that_takes_text_is_refused(tmp_path: Path) -> None:
    texts = [helper.make_tensor_value_info(name, TensorProto.STRING, [1]) for name in ("x", "y")]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "test", texts[:1], texts[1:]), ir_version=10)
    onnx.save(model, tmp_path / "text.onnx")
    with pytest.raises(Int8FileError, match=r"takes tensor\(string\)"):
        load_graph(tmp_path / "text.onnx", verify=False)
