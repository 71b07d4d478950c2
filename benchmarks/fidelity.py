"""How close the int8 network is to the fake-quant network that was trained: ours beside torch's default.

    python -m benchmarks.fidelity                              # the digits CNN, a minute
    python -m benchmarks.fidelity --images FOLDER --epochs 4   # and a ResNet-20, a quarter of an hour

FOLDER holds train/<class>/ and test/<class>/ with images of 32x32. Each network is trained in
float, then for an epoch with fake-quantization and half a one with observers frozen. For every
backend and both qconfigs the script prints the SQNR in dB and the share of equal predictions on the
test split, between the fake-quant outputs and those of torch's int8 network and of the QDQ reference
graph: run by PyTorch, and as an ONNX file by ONNX Runtime, node by node as it is written, and by its
int8 kernels. The JSON also has each layer: SQNR of the int8 layer's output against the fake-quant
layer's, each fed by its own network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.accuracy.tasks import read
from examples.cifar10.networks import ResNet20
from qat_lightning import convert, export_onnx, prepare
from qat_lightning.base.sqnr import sqnr
from qat_lightning.export.runtime import OnnxRuntime, RuntimeNetwork
from qat_lightning.modes.lowering.int8.layers import Int8Layer
from qat_lightning.modes.lowering.int8.qparams import dequantized, quantized
from qat_lightning.modes.lowering.reference import reference
from qat_lightning.tasks.data.digits import load_digits
from qat_lightning.tasks.models import DigitsCNN

BACKENDS = ("x86", "onednn", "qnnpack")


class Task(NamedTuple):
    """A network to train, and the images and labels to train and to test on."""

    name: str
    build: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    augment: Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--images", type=Path, help="folder with train/<class>/ and test/<class>/ of 32x32 images"
    )
    parser.add_argument("--epochs", type=int, default=4, help="float epochs of the ResNet-20")
    parser.add_argument("--qconfigs", nargs="+", choices=("ours", "torch"), default=["ours", "torch"])
    parser.add_argument("--output", type=Path, default=Path("fidelity.json"))
    args = parser.parse_args()
    tasks = [digits()]
    if args.images is not None:
        tasks.append(photographs(args.images, args.epochs))
    rows = [row for task in tasks for row in measure(task, args.qconfigs)]
    args.output.write_text(json.dumps(rows, indent=2))
    Console().print(table(rows))
    print(f"All figures: {args.output}")


def digits() -> Task:
    images, labels = load_digits()
    images = images.float() / images.max() if images.ndim == 4 else images.float()[:, None] / images.max()
    return Task(
        "digits CNN",
        DigitsCNN,
        (images[:1200], labels[:1200]),
        (images[1200:], labels[1200:]),
        6,
        lambda x: x,
    )


def photographs(folder: Path, epochs: int) -> Task:
    train, test = (read(folder / name) for name in ("train", "test"))
    flip = v2.RandomHorizontalFlip()
    return Task("ResNet-20", ResNet20, train, test, epochs, flip)


def measure(task: Task, qconfigs: list[str]) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    network = task.build()
    train(task, network, task.epochs, 0.1 if task.name == "ResNet-20" else 0.05)
    weights = network.state_dict()
    for backend in BACKENDS:
        for qconfig in qconfigs:
            torch.manual_seed(1)
            network = task.build()
            network.load_state_dict(weights)
            prepared = prepare(network, backend=backend, qconfig=None if qconfig == "ours" else qconfig)
            train(task, prepared, 1, 0.01)
            prepared.apply(torch.ao.quantization.disable_observer)
            train(task, prepared, 0.5, 0.001)
            row = compare(task, prepared)
            yield {"network": task.name, "backend": backend, "qconfig": qconfig} | row


def train(task: Task, network: nn.Module, epochs: float, lr: float) -> None:
    images, labels = task.train
    steps = int(epochs * len(images) / 64)
    optimizer = torch.optim.SGD(network.train().parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    for _ in track(range(steps), f"training {task.name}", transient=True):
        batch = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(network(task.augment(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


@torch.no_grad()
def compare(task: Task, prepared: nn.Module) -> dict[str, Any]:
    images, labels = task.test
    int8 = convert(prepared)
    expected = batched(prepared, images)
    found = {
        "int8": batched(int8, images),
        "reference": batched(reference(prepared), images),
        "qdq": run_qdq(prepared, images, optimize=False),
        "runtime": run_qdq(prepared, images, optimize=True),
    }
    row: dict[str, Any] = {"accuracy_fake_quant": agreement(expected, labels)}
    for name, outputs in found.items():
        row[f"sqnr_{name}"] = sqnr(expected, outputs)
        row[f"same_top1_{name}"] = (outputs.argmax(1) == expected.argmax(1)).float().mean().item()
        row[f"accuracy_{name}"] = agreement(outputs, labels)
    row["layers"] = layers(prepared, int8, images[:256])
    return row


def batched(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(batch) for batch in images.split(256)])


def agreement(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.argmax(1) == labels).float().mean().item()


def run_qdq(prepared: nn.Module, images: Tensor, *, optimize: bool) -> Tensor:
    """Returns the outputs of the QDQ file in ONNX Runtime, by its int8 kernels or node by node as written."""
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(prepared, Path(folder) / "qdq.onnx", (images[:8],), min_sqnr=0)
        return batched(RuntimeNetwork(OnnxRuntime(path.read_bytes(), optimize=optimize)), images)


def layers(prepared: nn.Module, int8: nn.Module, images: Tensor) -> dict[str, float]:
    """Returns the SQNR of each int8 layer's output against the rounded output of the fake-quant layer."""
    outputs: list[dict[str, Tensor]] = [{}, {}]
    names = {n for n, m in prepared.named_modules() if hasattr(m, "weight_fake_quant")}
    for network, seen in zip((prepared, int8), outputs, strict=True):
        modules = dict(network.named_modules())
        handles = [
            modules[name].register_forward_hook(
                lambda _, __, output, name=name, seen=seen: seen.__setitem__(name, output)
            )
            for name in names
            if name in modules
        ]
        network(images)
        for handle in handles:
            handle.remove()
    found = {}
    for name, output in outputs[1].items():
        module = modules[name]
        qparams = module.output_qparams() if isinstance(module, Int8Layer) else None
        if qparams is not None:
            wanted = dequantized(quantized(outputs[0][name], qparams), qparams)
            found[name] = sqnr(wanted, dequantized(output, qparams))
        elif output.is_quantized:
            scale, zero = output.q_scale(), output.q_zero_point()
            wanted = torch.fake_quantize_per_tensor_affine(outputs[0][name], scale, zero, 0, 255)
            found[name] = sqnr(wanted, output.dequantize())
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="Against the fake-quant outputs, test split")
    columns = (
        "network",
        "backend",
        "qconfig",
        "int8 dB",
        "same top-1",
        "reference dB",
        "same top-1",
        "QDQ dB",
        "same top-1",
        "runtime dB",
        "same top-1",
        "worst layer dB",
    )
    for column in columns:
        result.add_column(column, justify="left" if column in columns[:3] else "right")
    for row in rows:
        worst = min(row["layers"].values(), default=float("nan"))
        result.add_row(
            row["network"],
            row["backend"],
            row["qconfig"],
            f"{row['sqnr_int8']:.1f}",
            f"{row['same_top1_int8']:.2%}",
            f"{row['sqnr_reference']:.1f}",
            f"{row['same_top1_reference']:.2%}",
            f"{row['sqnr_qdq']:.1f}",
            f"{row['same_top1_qdq']:.2%}",
            f"{row['sqnr_runtime']:.1f}",
            f"{row['same_top1_runtime']:.2%}",
            f"{worst:.1f}",
        )
    return result


if __name__ == "__main__":
    main()
