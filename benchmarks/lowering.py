"""How fast int8 networks on plain tensors run on a CPU, beside those of `convert`.

    python -m benchmarks.lowering                                  # five networks, batch 1 and 16
    python -m benchmarks.lowering resnet18 --batches 1 --threads 1 2

Each network is prepared for onednn and for x86, and calibrated by two forwards of random images. In each
round all variants run one after the other, so that what else the machine does falls on all alike: `convert`
with both backends, and the lowering of the network that was prepared for onednn. Ratios are medians of the
ratios of a round. The first table says how close the outputs are to those of the fake-quant network.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision import models

from benchmarks.latency import interleaved, parser_for, run
from qat_lightning import convert, prepare
from qat_lightning.base.sqnr import sqnr
from qat_lightning.modes.lowering.lower import lower
from qat_lightning.modes.lowering.reference import reference

MODELS = ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "deit_tiny_patch16_224")
VARIANTS = ("x86", "onednn", "lowered")


def build(name: str) -> nn.Module:
    """Returns a float network with random weights; batch-norm statistics are those of the last batch."""
    torch.manual_seed(0)
    if hasattr(models, name):
        network: nn.Module = getattr(models, name)()
    else:
        import timm

        network = timm.create_model(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    return network


@torch.no_grad()
def calibrated(name: str, backend: str) -> nn.Module:
    """Returns a prepared network whose ranges are known."""
    example = (torch.randn(2, 3, 224, 224),)
    prepared = prepare(build(name), backend=backend, example_inputs=example).train()
    torch.manual_seed(1)
    for _ in range(2):
        prepared(torch.randn(4, 3, 224, 224))
    return prepared.eval()


@torch.no_grad()
def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    prepared = calibrated(name, "onednn")
    graph: Any = reference(prepared)
    networks = [convert(calibrated(name, "x86")), convert(prepared), lower(graph)]
    x = torch.randn(4, 3, 224, 224)
    wanted, today, ours = (network(x) for network in (prepared, *networks[1:]))
    result: dict[str, Any] = {
        "fidelity": {
            "equal": (ours == wanted).float().mean().item(),
            "sqnr": sqnr(wanted, ours),
            "equal_of_convert": (today == wanted).float().mean().item(),
            "sqnr_of_convert": sqnr(wanted, today),
        }
    }
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batches:
            result[f"{threads} threads, batch {batch}"] = time_networks(networks, batch, args.rounds)
    return result


def time_networks(networks: list[nn.Module], batch: int, rounds: int) -> dict[str, Any]:
    """Returns medians in milliseconds, and the ratios of the last network to the others."""
    times = interleaved(networks, torch.randn(batch, 3, 224, 224), rounds)
    columns = list(zip(*times, strict=True))
    ratios = [[each[-1] / each[i] for each in times] for i in range(len(networks) - 1)]
    return {
        "ms": dict(zip(VARIANTS, map(statistics.median, columns), strict=True)),
        "ratios": dict(zip(VARIANTS[:-1], map(statistics.median, ratios), strict=True)),
    }


def show(results: dict[str, Any]) -> None:
    console = Console()
    table = Table("network", "equal", "SQNR, dB", "equal, convert", "SQNR, dB")
    for name, result in results.items():
        found = result["fidelity"]
        equal, other = f"{found['equal']:.2%}", f"{found['equal_of_convert']:.2%}"
        table.add_row(name, equal, f"{found['sqnr']:.1f}", other, f"{found['sqnr_of_convert']:.1f}")
    console.print(table)
    table = Table("network", "", *(f"{name}, ms" for name in VARIANTS), "to x86", "to onednn")
    for name, result in results.items():
        for key, row in result.items():
            if key != "fidelity":
                milliseconds = [f"{row['ms'][variant]:.1f}" for variant in VARIANTS]
                table.add_row(name, key, *milliseconds, *(f"{r:.2f}" for r in row["ratios"].values()))
    console.print(table)


def main() -> None:
    parser = parser_for(__doc__, MODELS, rounds=15)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    run(parser, measure, show)


if __name__ == "__main__":
    main()
