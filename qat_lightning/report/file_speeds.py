"""Measures the speeds of a run's int8 files, each against float on the same runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from torch import nn

from qat_lightning.base.inputs import Inputs, arguments_of
from qat_lightning.export import load_runtime
from qat_lightning.export.example import example_of
from qat_lightning.export.onnx import write_graph
from qat_lightning.export.openvino import convert_graph
from qat_lightning.export.runtime import OnnxRuntime, OpenVino, Runtime, RuntimeNetwork
from qat_lightning.modes.lowering.reference import floating
from qat_lightning.report.content import Speed
from qat_lightning.report.speed import Candidate, measure


class FileSpeeds(NamedTuple):
    """The measured speeds.

    Attributes:
        speeds: The speeds for each network, runtime and batch size, float before int8.
        float_operations: For each runtime, how many operations of each kind it runs in float between int8
            operations.
    """

    speeds: tuple[Speed, ...]
    float_operations: dict[str, dict[str, int]]


def file_speeds(
    prepared: nn.Module, int8: nn.Module, inputs: Mapping[str, Inputs], files: Sequence[Path], threads: int
) -> FileSpeeds:
    """Measures each network of a module in float and in int8, in PyTorch and in the runtime of each file.

    Args:
        prepared: The module with the prepared networks, in eval mode on the CPU.
        int8: The module after conversion.
        inputs: The inputs to run each network on, by the network's name.
        files: The exported files.
        threads: Threads of every runtime.
    """
    speeds: list[Speed] = []
    operations: dict[str, dict[str, int]] = {}
    for name, caught in inputs.items():
        network, suffix = prepared.get_submodule(name), f" {name}" if len(inputs) > 1 else ""
        groups = [_in_torch(network, int8.get_submodule(name), suffix)]
        for path in _graphs(files, name, len(inputs)):
            exported = load_runtime(path, threads=threads)
            assert isinstance(exported, RuntimeNetwork)
            runtime = exported.runtime
            in_float = RuntimeNetwork(_float_on(runtime, network, caught, threads)).eval()
            groups.append(_pair(runtime.name, in_float, exported, suffix))
            operations[runtime.name] = dict(runtime.float_operations().most_common())
        speeds += measure(groups, caught, threads=threads, console=Console(stderr=True))
    return FileSpeeds(tuple(speeds), operations)


def _in_torch(prepared: nn.Module, int8: nn.Module, suffix: str) -> list[Candidate]:
    return _pair("PyTorch", floating(prepared), int8.eval(), suffix)


def _pair(runtime: str, in_float: nn.Module, int8: nn.Module, suffix: str) -> list[Candidate]:
    return [Candidate(f"float{suffix}", runtime, in_float), Candidate(f"int8{suffix}", runtime, int8)]


def _graphs(files: Sequence[Path], name: str, networks: int) -> Iterator[Path]:
    """Returns the exported files of a network that contain a graph."""
    stem = f"int8.{name}" if networks > 1 else "int8"
    return (path for path in files if path.suffix != ".pt" and path.stem == stem)


def _float_on(runtime: Runtime, prepared: nn.Module, inputs: Inputs, threads: int) -> Runtime:
    """Returns the network in float, loaded in the runtime of an int8 file."""
    example = example_of(prepared, arguments_of(prepared, inputs))
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "float.onnx"
        write_graph(example, graph, example.metadata, floating)
        if isinstance(runtime, OnnxRuntime):
            return OnnxRuntime(graph.read_bytes(), threads=threads)
        return OpenVino(*convert_graph(graph, example.metadata), threads=threads, float32=True)
