"""How fast int8 networks on plain tensors run on a CPU, beside those on quantized tensors.

    python -m benchmarks.lowering                                  # five networks, batch 1 and 16
    python -m benchmarks.lowering resnet18 --batches 1 --threads 1 2

Each network is prepared for x86 and for fbgemm, which round alike, and calibrated by two forwards of random
images. `convert` makes plain tensors of the first, and PyTorch's quantized tensors of the second. In each
round both run one after the other, so that what else the machine does falls on both alike. Ratios are medians
of the ratios of a round. The first table says how close the outputs are to those of the fake-quant network.
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

MODELS = ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "deit_tiny_patch16_224")
VARIANTS = {"quantized": "fbgemm", "plain": "x86"}
"""The backends by the kind of tensors that the int8 network computes with."""


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
    prepared = {kind: calibrated(name, backend) for kind, backend in VARIANTS.items()}
    networks = {kind: convert(network) for kind, network in prepared.items()}
    x = torch.randn(4, 3, 224, 224)
    result: dict[str, Any] = {"fidelity": {}}
    for kind, network in networks.items():
        wanted, found = prepared[kind](x), network(x)
        equal = (found == wanted).float().mean().item()
        result["fidelity"][kind] = {"equal": equal, "sqnr": sqnr(wanted, found)}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batches:
            result[f"{threads} threads, batch {batch}"] = time_networks(
                [*networks.values()], batch, args.rounds
            )
    return result


def time_networks(networks: list[nn.Module], batch: int, rounds: int) -> dict[str, Any]:
    """Returns medians in milliseconds, and the ratio of the second network to the first."""
    times = interleaved(networks, torch.randn(batch, 3, 224, 224), rounds)
    milliseconds = map(statistics.median, zip(*times, strict=True))
    ratio = statistics.median(second / first for first, second in times)
    return {"ms": dict(zip(VARIANTS, milliseconds, strict=True)), "ratio": ratio}


def show(results: dict[str, Any]) -> None:
    console = Console()
    table = Table("network", *(f"{kind}: {what}" for kind in VARIANTS for what in ("equal", "SQNR, dB")))
    for name, result in results.items():
        found = [result["fidelity"][kind] for kind in VARIANTS]
        cells = [cell for each in found for cell in (f"{each['equal']:.2%}", f"{each['sqnr']:.1f}")]
        table.add_row(name, *cells)
    console.print(table)
    table = Table("network", "", *(f"{kind}, ms" for kind in VARIANTS), "ratio")
    for name, result in results.items():
        for key, row in result.items():
            if key != "fidelity":
                milliseconds = [f"{row['ms'][kind]:.1f}" for kind in VARIANTS]
                table.add_row(name, key, *milliseconds, f"{row['ratio']:.2f}")
    console.print(table)


def main() -> None:
    parser = parser_for(__doc__, MODELS, rounds=15)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    run(parser, measure, show)


if __name__ == "__main__":
    main()
