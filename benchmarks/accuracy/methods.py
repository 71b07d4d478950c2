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
"""That of this machine: activations have 8 bits where there is VNNI, else 7, whose sums do not overflow."""
CALIBRATION = 8
"""Training batches that post-training quantization sees."""
Scores = dict[str, float]


def tuned_float(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """The float network, trained for as many epochs as every other method has."""
    return {"float": _score(task, network.eval())}


def post_training(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Post-training quantization by torch's FX flow, of the float network that was trained as long."""
    mapping = get_default_qconfig_mapping(BACKEND)
    prepared = prepare_fx(network.eval(), mapping, (task.test[0][:1],)).to(DEVICE)
    for _, (images, _) in zip(range(CALIBRATION), task.batches(seed, 0), strict=False):
        prepared(images)
    return {"int8": _score(task, convert_fx(prepared.cpu()))}


def ours(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """This package, as it is by default."""
    callback = QuantizationAwareTraining(backend=BACKEND, convert=None, preflight=False)
    return forms(task, train(task, network, seed, epochs(task), lr, callback=callback))


def torch_fx(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Torch's FX flow with its default qconfig."""
    mapping = get_default_qat_qconfig_mapping(BACKEND)
    prepared = prepare_qat_fx(network.train(), mapping, (task.test[0][:1],))
    train(task, prepared, seed, epochs(task), lr)
    return torch_forms(task, prepared)


def torchvision_loop(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Torch's FX flow with the points of torchvision's reference script, and its learning rate of 1e-4.

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
    """NNCF's post-training quantization of the PyTorch network, then training; scored in simulated int8."""
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
    """The numbers of the epochs after those of the float training."""
    return range(task.epochs, task.epochs + task.tuning)


def forms(task: Task, prepared: nn.Module) -> Scores:
    """The accuracy of a trained network of this package as it is trained, and as it runs."""
    return {
        "fake-quant": _score(task, prepared),
        "int8": _score(task, convert(prepared)),
        "int8 in ONNX Runtime": _score(task, _in_onnx_runtime(task, prepared)),
    }


def torch_forms(task: Task, prepared: GraphModule) -> Scores:
    """The accuracy of a trained network of torch's FX flow."""
    return {"fake-quant": _score(task, prepared), "int8": _score(task, convert_fx(prepared.cpu()))}


def _in_onnx_runtime(task: Task, prepared: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = export_onnx(prepared, Path(folder) / "int8.onnx", (task.test[0][:8],))
        return load_runtime(path, threads=torch.get_num_threads())
