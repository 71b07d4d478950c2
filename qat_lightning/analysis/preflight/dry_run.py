"""Dry-runs a copy of a prepared network: one training step, the conversion, an int8 forward."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat_lightning.analysis.preflight import inventory
from qat_lightning.analysis.preflight.call_location import call_lines, follow
from qat_lightning.analysis.preflight.diagnosis import explain
from qat_lightning.analysis.preflight.network_report import NetworkReport
from qat_lightning.base.errors import PreflightError
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.nested import tensors_in
from qat_lightning.base.sqnr import sqnr
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.quantize.batch_norms import make_local, restore_batch_norms
from qat_lightning.quantize.convert import convert_in_place
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.recipe import recipe_of


def dry_run(name: str, prepared: nn.Module, inputs: Inputs) -> NetworkReport:
    """Does a training step, the conversion and an int8 forward, and describes the result.

    Args:
        name: Name of the network in the LightningModule.
        prepared: A copy of the prepared network, on the CPU. It is changed.
        inputs: Inputs of the network.

    Raises:
        PreflightError: One of these steps fails.
    """
    start = time.perf_counter()
    recipe = recipe_of(prepared)
    assert recipe is not None
    _train_once(name, prepared, inputs)
    with torch.no_grad(), stage("eval forward", name, prepared), call_lines(prepared) as lines:
        expected = prepared(*inputs.args, **inputs.kwargs)
    work = inventory.count_work(prepared, inputs)
    int8, found = _convert_and_run(name, prepared, inputs)
    layers, floats = inventory.layers(prepared, int8, recipe, work, lines)
    return NetworkReport(
        name,
        type(prepared).__name__,
        recipe.mode,
        recipe.backend,
        len(layers),
        inventory.fused_layers(prepared),
        recipe.relu6,
        tuple(floats),
        tuple(inventory.batch_norms(int8, lines)),
        tuple(inventory.float_ops(int8)),
        sum(work.layers.get(layer, 0) for layer in layers) / max(work.total, 1),
        _sqnr(expected, found),
        time.perf_counter() - start,
    )


def _train_once(name: str, prepared: nn.Module, inputs: Inputs) -> None:
    restore_batch_norms(prepared)
    make_local(prepared)
    set_enabled(prepared, observer=True, fake_quant=True)
    prepared.train()
    with stage("training forward", name, prepared):
        outputs = prepared(*inputs.args, **inputs.kwargs)
    with stage("backward", name, prepared):
        _surrogate_loss(outputs).backward()
    prepared.zero_grad()
    prepared.eval()


def _convert_and_run(name: str, prepared: nn.Module, inputs: Inputs) -> tuple[nn.Module, Any]:
    """Returns the int8 network and its outputs."""
    int8 = copy_of(prepared)
    with stage("conversion", name, int8):
        int8 = convert_in_place(int8)
        _check_eval(int8)
    with torch.no_grad(), stage("int8 forward", name, int8), warnings.catch_warnings():
        warnings.filterwarnings("error", "All inputs of this cat operator must share")
        return int8, int8(*inputs.args, **inputs.kwargs)


@contextmanager
def stage(what: str, name: str, network: nn.Module) -> Iterator[None]:
    """Turns an error in the block into a `PreflightError` that names the place and the fix."""
    with follow(network) as here:
        try:
            yield
        except PreflightError:
            raise
        except Exception as error:
            raise explain(error, network, name, what, here) from error


def _surrogate_loss(outputs: Any) -> torch.Tensor:
    """Returns a loss that depends on all outputs. The user's own loss may need labels."""
    terms = [v.float().square().mean() for v in tensors_in(outputs) if v.requires_grad]
    if not terms:
        raise RuntimeError("its outputs hold no tensor with a gradient")
    return torch.stack(terms).sum()


def _check_eval(int8: nn.Module) -> None:
    """Raises a `PreflightError` if a module ignores `eval()`, because it would run in training mode."""
    for name, module in int8.named_modules():
        if module.training:
            kind = type(module)
            code = getattr(kind.train, "__code__", None)
            line = f"{code.co_filename}:{code.co_firstlineno}: def train" if code else None
            raise PreflightError(
                f"{name or kind.__name__!r} stays in training mode after eval(), so it would be converted in "
                f"training mode. Its class overrides `train`" + (f" at {line}" if line else "") + ".\n"
                "To fix it: let `train(mode)` call super().train(mode), and change nothing if mode is False.",
                path=name,
                line=line,
            )


def _sqnr(expected: Any, found: Any) -> float:
    """Returns the SQNR between two nested outputs, over all floating-point tensors."""
    pairs = [
        (a.float().flatten(), b.float().flatten())
        for a, b in zip(tensors_in(expected), tensors_in(found), strict=True)
        if a.is_floating_point()
    ]
    return sqnr(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
