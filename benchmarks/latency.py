"""How fast the exported files run, beside the files of the runtimes' own post-training quantizers.

    python -m benchmarks.latency                               # four networks, batch 1 and 16, 224x224
    python -m benchmarks.latency resnet18 --batches 1 --rounds 50

For each network and runtime three files are timed in one process, one after the other in each round, so that
what else the machine does falls on all alike: float32 (OpenVINO is told so; it would take bfloat16 itself on
CPUs that have it), int8 by the runtime's own quantizer (ONNX Runtime's `quantize_static`, NNCF for OpenVINO),
and ours. Figures are medians; ratios are medians of the ratios of a round. All hold the same weights, which
two steps of training make: a network that was never trained has biases of zero, which runtimes leave out. The
export of each network is timed in a process of its own, whose greatest memory is shown, with all that it
imports and those two steps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torchvision import models

from qat_lightning import export_onnx, export_openvino, prepare
from qat_lightning.base import cpu
from qat_lightning.export.runtime import OnnxRuntime, OpenVino, Runtime, RuntimeNetwork
from qat_lightning.modes.lowering.reference import floating

BACKEND = "x86" if cpu.overflows() else "onednn"
MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large")
VARIANTS = {"float": "float", "own": "own quantizer", "ours": "ours"}
"""Describes each file, by its name."""


def trained(name: str) -> nn.Module:
    """Returns a prepared network that has seen two small batches, so that every range is known.

    Batch-norm statistics are those of the last batch: two are no average.
    """
    torch.manual_seed(0)
    network = getattr(models, name)()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    prepared = prepare(network, backend=BACKEND).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(torch.randn(8, 3, 96, 96)).sub(1).square().mean().backward()
        optimizer.step()
    return prepared.eval()


def export_ours(name: str, folder: Path, results: Any) -> None:
    """Writes our files, in a process of its own to measure the memory of the export."""
    torch.set_num_threads(multiprocessing.cpu_count())
    warnings.simplefilter("ignore")
    prepared, x = trained(name), (torch.randn(2, 3, 224, 224),)
    start = time.perf_counter()
    export_onnx(prepared, folder / "ours.onnx", x, min_sqnr=5)  # hardly trained, it amplifies each rounding
    results["export_s"], results["process_bytes"] = time.perf_counter() - start, peak_memory()
    export_openvino(prepared, folder / "ours.xml", x, min_sqnr=5)


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def export_float(name: str, folder: Path) -> None:
    network = floating(trained(name))
    torch.onnx.export(
        network, (torch.randn(2, 3, 224, 224),), folder / "float.onnx", dynamo=True, verbose=False,
        external_data=False, dynamic_shapes=({0: torch.export.Dim.AUTO},),
    )  # fmt: skip


def quantize_by_onnx_runtime(folder: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": torch.randn(2, 3, 224, 224).numpy()}] * 2)

        def get_next(self) -> Any:
            return next(self.batches, None)

    quant_pre_process(folder / "float.onnx", folder / "plain.onnx")
    quantize_static(
        folder / "plain.onnx", folder / "own.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
    )  # fmt: skip


def quantize_by_nncf(folder: Path, preset: str) -> None:
    import nncf
    import openvino

    model = openvino.convert_model(folder / "float.onnx")
    openvino.save_model(model, folder / "float.xml", compress_to_fp16=False)
    batches = [torch.randn(1, 3, 224, 224).numpy() for _ in range(4)]
    chosen = nncf.QuantizationPreset(preset)
    quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=4, preset=chosen)
    openvino.save_model(quantized, folder / "own.xml", compress_to_fp16=False)


def runtimes(folder: Path, threads: int) -> dict[str, list[RuntimeNetwork]]:
    """Returns the files of each runtime, in the order of `VARIANTS`."""
    loaded: dict[str, list[Runtime]] = {OnnxRuntime.name: [], OpenVino.name: []}
    for name in VARIANTS:
        graph, xml, weights = (
            (folder / f"{name}.{suffix}").read_bytes() for suffix in ("onnx", "xml", "bin")
        )
        loaded[OnnxRuntime.name].append(OnnxRuntime(graph, threads=threads))
        loaded[OpenVino.name].append(OpenVino(xml, weights, threads=threads, float32=name == "float"))
    return {runtime: [RuntimeNetwork(each) for each in files] for runtime, files in loaded.items()}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary, multiprocessing.Manager() as manager:
        folder, shared = Path(temporary), manager.dict()
        process = multiprocessing.get_context("spawn").Process(
            target=export_ours, args=(name, folder, shared)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"The export of {name} failed.")
        export_float(name, folder)
        quantize_by_onnx_runtime(folder)
        quantize_by_nncf(folder, args.preset)
        sizes = {kind: (folder / f"{kind}.onnx").stat().st_size for kind in ("float", "own", "ours")}
        rows = {
            runtime: {str(batch): time_files(networks, batch, args.rounds) for batch in args.batches}
            for runtime, networks in runtimes(folder, args.threads).items()
        }
        return {**shared, "bytes": sizes, "runtimes": rows}


def time_files(networks: list[RuntimeNetwork], batch: int, rounds: int) -> dict[str, Any]:
    """Returns medians in milliseconds, and the ratios of the third file to the other two."""
    x = torch.randn(batch, 3, 224, 224)
    times = interleaved(networks, x, rounds)
    columns = list(zip(*times, strict=True))
    return {
        "ms": dict(zip(VARIANTS, map(statistics.median, columns), strict=True)),
        "to own quantizer": statistics.median(ours / own for _, own, ours in times),
        "faster than float": statistics.median(plain / ours for plain, _, ours in times),
    }


def interleaved(networks: Sequence[Callable[..., Any]], x: torch.Tensor, rounds: int) -> list[list[float]]:
    """Returns the milliseconds of each network in each round, one network after the other."""
    for network in networks:
        network(x)
    times: list[list[float]] = []
    for _ in range(rounds):
        times.append([])
        for network in networks:
            network(x)  # caches hold its weights then, and not those of the network before it
            start = time.perf_counter()
            network(x)
            times[-1].append(1e3 * (time.perf_counter() - start))
    return times


def show(results: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        "network", "runtime", "batch", *(f"{v}, ms" for v in VARIANTS.values()), "to own", "over float"
    )
    for name, result in results.items():
        for runtime, batches in result["runtimes"].items():
            for batch, row in batches.items():
                milliseconds = [f"{row['ms'][variant]:.2f}" for variant in VARIANTS]
                ratios = f"{row['to own quantizer']:.2f}", f"{row['faster than float']:.2f}"
                table.add_row(name, runtime, batch, *milliseconds, *ratios)
    console.print(table)
    table = Table("network", "size of float", "export, s", "process, MiB")
    for name, result in results.items():
        share = result["bytes"]["ours"] / result["bytes"]["float"]
        table.add_row(
            name, f"{share:.3f}", f"{result['export_s']:.1f}", f"{result['process_bytes'] / 2**20:.0f}"
        )
    console.print(table)


def parser_for(description: str | None, names: tuple[str, ...], rounds: int) -> argparse.ArgumentParser:
    """Returns a parser of the options that measurements of networks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=names)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    return parser


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[str, argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Measures each network that the command line names, and shows and writes the figures."""
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    results = {name: measure(name, args) for name in track(args.names, "networks")}
    show(results)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    parser = parser_for(__doc__, MODELS, rounds=30)
    parser.add_argument(
        "--preset",
        choices=("performance", "mixed"),
        default="performance",
        help="NNCF's activations: symmetric, or asymmetric (mixed)",
    )
    parser.add_argument("--threads", type=int, default=2)
    run(parser, measure, show)


if __name__ == "__main__":
    main()
