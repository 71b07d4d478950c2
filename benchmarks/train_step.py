"""What a step of quantization-aware training costs, relative to a step of float training.

    python -m benchmarks.train_step                                  # four networks, batch 32x3x64x64, CPU
    python -m benchmarks.train_step --size 224 --rounds 0            # memory at full size, no times
    python -m benchmarks.train_step --models deit_tiny_patch16_224 --size 224 --batch 4 --backend openvino
    python -m benchmarks.train_step --device cuda --dtype bfloat16 --compile --variants "ours, observing"

A step is forward, backward and SGD. All variants of a network are timed in one process, a step of
each in turn, so that what else the machine does falls on all alike; the figure is the median of the
ratios to the float step of the same round. Memory is the peak of what autograd and the optimizer
hold, above the weights: on CUDA the allocator's peak, on the CPU the bytes saved for backward. Variants:

- ours, observing; observers frozen; all frozen (batch-norm statistics too)
- torch fx: `prepare_qat_fx` with PyTorch's default mapping for the backend
- torch eager: torchvision's quantizable variant, fused and prepared as in its reference script
- NNCF and Brevitas, where they are installed (pip install ".[bench]"): calibrated, then trained.
  Brevitas folds batch norm into the convolutions first, so that its steps have none.

A network's name is torchvision's or timm's. A peer that cannot train a network is a dash in the table,
and its error is in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision import models
from torchvision.models import quantization as quantizable

from qat_lightning import prepare
from qat_lightning.base.backends import BACKENDS
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.base.schedule import Phase
from qat_lightning.fake_quant.phases import enter

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large")
OURS = ("ours, observing", "ours, observers frozen", "ours, all frozen")
PEERS = ("torch fx", "torch eager", "NNCF", "Brevitas")


def ours(network: nn.Module, x: Tensor, backend: str, *, observe: bool, freeze_bn: bool) -> nn.Module:
    prepared = prepare(network, backend=backend, example_inputs=x[:2]).train()
    with torch.no_grad():
        prepared(x[:2])
    enter(prepared, Phase(fake_quant=True, observe=observe, freeze_bn=freeze_bn))
    return prepared


def torch_fx(network: nn.Module) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(network, get_default_qat_qconfig_mapping("x86"), ())


def torch_eager(name: str) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    network = getattr(quantizable, name)(quantize=False).train()
    network.fuse_model(is_qat=True)
    network.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(network)


def nncf(network: nn.Module, x: Tensor) -> nn.Module:
    import nncf as package

    return package.quantize(settled(network, x), package.Dataset([x]), subset_size=1).train()


def brevitas(network: nn.Module, x: Tensor) -> nn.Module:
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import COMPUTE_LAYER_MAP, preprocess_for_quantize, quantize
    from brevitas.quant import Int8WeightPerChannelFloat

    layers = dict(COMPUTE_LAYER_MAP)  # per-tensor weights
    for kind in (nn.Conv2d, nn.Linear):
        layer, settings = layers[kind]
        layers[kind] = (layer, {**settings, "weight_quant": Int8WeightPerChannelFloat})
    quantized = quantize(preprocess_for_quantize(settled(network, x).eval()), compute_layer_map=layers)
    with torch.no_grad(), calibration_mode(quantized):
        quantized(x)
    return quantized.train()


def settled(network: nn.Module, x: Tensor) -> nn.Module:
    """Returns the network with the batch-norm statistics of `x`: peers calibrate in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(x)
    return network


def float_network(name: str) -> nn.Module:
    """Returns a network of torchvision or timm, with random weights, in training mode."""
    if hasattr(models, name):
        return getattr(models, name)().train()
    import timm

    return timm.create_model(name).train()


def variants(name: str, x: Tensor, backend: str) -> dict[str, Callable[[], nn.Module]]:
    def fresh() -> nn.Module:
        return float_network(name)

    def mine(*, observe: bool = False, freeze_bn: bool = False) -> nn.Module:
        return ours(fresh(), x, backend, observe=observe, freeze_bn=freeze_bn)

    made: dict[str, Callable[[], nn.Module]] = {
        "float": fresh,
        "ours, observing": lambda: mine(observe=True),
        "ours, observers frozen": mine,
        "ours, all frozen": lambda: mine(freeze_bn=True),
        "torch fx": lambda: torch_fx(fresh()),
    }
    if hasattr(quantizable, name):
        made["torch eager"] = lambda: torch_eager(name)
    if find_spec("nncf"):
        made["NNCF"] = lambda: nncf(fresh(), x)
    if find_spec("brevitas"):
        made["Brevitas"] = lambda: brevitas(fresh(), x)
    return made


class Stepper:
    """A network with its optimizer; a call does one training step."""

    def __init__(self, network: nn.Module, args: argparse.Namespace) -> None:
        self.network = network.to(args.device)
        self.forward: Any = torch.compile(self.network) if args.compile else self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-4, momentum=0.9)
        self.args = args

    def __call__(self, x: Tensor, labels: Tensor) -> None:
        autocast = self.args.dtype != torch.float32
        with torch.autocast(self.args.device, dtype=self.args.dtype, enabled=autocast):
            loss = nn.functional.cross_entropy(self.forward(x), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def memory(self, x: Tensor, labels: Tensor) -> int:
        """Returns the most bytes that a step holds."""
        if self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self(x, labels)
            return torch.cuda.max_memory_allocated() - before
        return saved_bytes(self.network, lambda: nn.functional.cross_entropy(self.network(x), labels))


def saved_bytes(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Returns what autograd keeps for the backward of `loss()`, without the parameters of `network`."""
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    del result
    return sum(saved.values())


def measure(name: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size)
    labels = torch.randint(1000, (args.batch,))
    made = {
        key: make for key, make in variants(name, x, args.backend).items() if key in {"float", *args.variants}
    }
    x, labels = x.to(args.device), labels.to(args.device)
    steppers: dict[str, Stepper] = {}
    memory: dict[str, int] = {}
    errors: dict[str, str] = {}
    for key, make in made.items():
        try:
            with quiet_torch_ao(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stepper = Stepper(make(), args)
            memory[key] = stepper.memory(x, labels)
            if args.rounds:
                stepper(x, labels)  # warm up
                steppers[key] = stepper
        except Exception as error:
            if key not in PEERS:
                raise
            errors[key] = f"{type(error).__name__}: {error}"
    times: dict[str, list[float]] = {key: [] for key in steppers}
    for _ in track(range(args.rounds), f"{name}", transient=True):
        for key, stepper in steppers.items():
            start = time.perf_counter()
            stepper(x, labels)
            times[key].append(time.perf_counter() - start)

    def figures(key: str) -> dict[str, float]:
        found = {"memory_megabytes": memory[key] / 1e6, "memory_ratio": memory[key] / memory["float"]}
        if args.rounds:
            found["milliseconds"] = statistics.median(times[key]) * 1e3
            found["ratio"] = statistics.median(t / f for t, f in zip(times[key], times["float"], strict=True))
        return found

    return {key: {"error": errors[key]} if key in errors else figures(key) for key in made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--backend", choices=BACKENDS, default="x86", help="of the variants called ours")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("train_step.json"))
    args = parser.parse_args()
    found = {name: measure(name, args) for name in args.models}
    args.output.write_text(json.dumps(found, indent=2))
    Console().print(table(found, args))
    written = [args.output]
    if args.rounds:
        written.append(args.output.with_suffix(".png"))
        plot(found, written[-1])
    print("All figures:", *written)


def table(found: dict[str, dict[str, dict[str, Any]]], args: argparse.Namespace) -> Table:
    title = f"Step time (and saved memory) over float, {args.batch}x3x{args.size}x{args.size}, {args.device}"
    result = Table(title=title)
    result.add_column("variant")
    for name in found:
        result.add_column(name, justify="right")
    keys = dict.fromkeys(key for row in found.values() for key in row)
    for key in keys:
        cells = []
        for row in found.values():
            cell = row.get(key, {})
            time = f"{cell['ratio']:.2f} " if "ratio" in cell else ""
            cells.append(f"{time}({cell['memory_ratio']:.2f})" if "memory_ratio" in cell else "-")
        result.add_row(key, *cells)
    return result


def plot(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3.5 * len(found), 3), squeeze=False, sharex=True)
    for axis, (name, row) in zip(axes[0], found.items(), strict=True):
        keys = [key for key in row if key != "float" and "ratio" in row[key]]
        axis.barh(keys[::-1], [row[key]["ratio"] for key in keys[::-1]])
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("step time over float")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
