"""Ways from a float network to an int8 one, each with the same budget of epochs."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path

import torch
from torch import nn
from torch.ao.quantization import (
    disable_observer,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.fx import GraphModule

from benchmarks.accuracy.tasks import DEVICE, Task
from benchmarks.accuracy.training import At, accuracy, outputs, train
from qat_lightning import QuantizationAwareTraining, convert, export_onnx, load_runtime
from qat_lightning.base import cpu
from qat_lightning.fake_quant.phases import freeze_bn_statistics

BACKEND = "x86" if cpu.overflows() else "onednn"
"""This machine's backend: activations of 8 bits with VNNI, else of 7 bits, whose sums do not overflow."""
CALIBRATION = 8
"""How many training batches calibrate post-training quantization."""
Scores = dict[str, float]


def tuned_float(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Trains the float network for as many epochs as every other method."""
    return {"float": _score(task, network.eval())}


def post_training(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Quantizes the float network, trained for as long, with torch's FX flow after training."""
    mapping = get_default_qconfig_mapping(BACKEND)
    prepared = prepare_fx(network.eval(), mapping, (task.test[0][:1],)).to(DEVICE)
    for _, (images, _) in zip(range(CALIBRATION), task.batches(seed, 0), strict=False):
        prepared(images)
    return {"int8": _score(task, convert_fx(prepared.cpu()))}


def ours(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Trains with this package and its defaults."""
    callback = QuantizationAwareTraining(backend=BACKEND, convert=None, preflight=False)
    return forms(task, train(task, network, seed, epochs(task), lr, callback=callback))


def torch_fx(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Trains with torch's FX flow and its default qconfig."""
    mapping = get_default_qat_qconfig_mapping(BACKEND)
    prepared = prepare_qat_fx(network.train(), mapping, (task.test[0][:1],))
    train(task, prepared, seed, epochs(task), lr)
    return torch_forms(task, prepared)


def torchvision_loop(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Trains with torch's FX flow, by the schedule and learning rate (1e-4) of torchvision's reference.

    There batch-norm statistics are frozen after three epochs, observers after four; here after three and four
    fifths of the training.
    """
    mapping = get_default_qat_qconfig_mapping(BACKEND)
    prepared = prepare_qat_fx(network.train(), mapping, (task.test[0][:1],))
    points = At(
        {
            3 / 5: partial(freeze_bn_statistics, frozen=True),
            4 / 5: methodcaller("apply", disable_observer),
        }
    )
    train(task, prepared, seed, epochs(task), 1e-4, callback=points, schedule=False)
    return torch_forms(task, prepared)


def nncf(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Quantizes the PyTorch network with NNCF after training, then trains it; scored in simulated int8."""
    import nncf as package

    batches = [images for _, (images, _) in zip(range(CALIBRATION), task.batches(seed, 0), strict=False)]
    quantized = package.quantize(network.eval().to(DEVICE), package.Dataset(batches), subset_size=CALIBRATION)
    train(task, quantized, seed, epochs(task), lr)
    return {"fake-quant": _score(task, quantized)}


METHODS: dict[str, Callable[[Task, nn.Module, int, float], Scores]] = {
    "float": tuned_float,
    "post-training": post_training,
    "ours": ours,
    "torch fx": torch_fx,
    "torchvision": torchvision_loop,
    "nncf": nncf,
}


def _score(task: Task, network: nn.Module) -> float:
    images, labels = task.test
    return accuracy(outputs(network, images), labels)


def epochs(task: Task) -> range:
    """Returns the numbers of the epochs that follow the float training."""
    return range(task.epochs, task.epochs + task.tuning)


def forms(task: Task, prepared: nn.Module) -> Scores:
    """Returns the accuracies of this package's network: with fake-quantization, and in int8."""
    return {
        "fake-quant": _score(task, prepared),
        "int8": _score(task, convert(prepared)),
        "int8 in ONNX Runtime": _score(task, _in_onnx_runtime(task, prepared)),
    }


def torch_forms(task: Task, prepared: GraphModule) -> Scores:
    """Returns the accuracy of a network trained with torch's FX flow."""
    return {"fake-quant": _score(task, prepared), "int8": _score(task, convert_fx(prepared.cpu()))}


def _in_onnx_runtime(task: Task, prepared: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = export_onnx(prepared, Path(folder) / "int8.onnx", (task.test[0][:8],))
        return load_runtime(path, threads=torch.get_num_threads())
