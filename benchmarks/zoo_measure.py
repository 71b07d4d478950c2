"""What the zoo does with one network: train a step with fake-quantization, convert, and compare."""

from __future__ import annotations

import math
import re
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.utils._pytree import tree_leaves

from benchmarks.zoo_models import Entry, entries
from qat_lightning import convert, prepare
from qat_lightning.analysis.preflight.inventory import count_work
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.sqnr import sqnr
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.quantize.recipe import recipe_of

Row = dict[str, Any]


def measure(name: str, way: str, gigabytes: float) -> Row:
    """Runs one network in this process, which may hold so much memory.

    Args:
        name: Of the entry.
        way: `"ours"`, or `"torch"` for `prepare_qat_fx` and `convert_fx` as they are.
        gigabytes: Bound of the address space.

    Returns:
        `ok`, and what was measured or the reason.
    """
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.perf_counter()
    entry = next(entry for entry in entries() if entry.name == name)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always" if way == "ours" else "ignore")
            row = _ours(entry) if way == "ours" else _torch(entry)
    except Exception as error:
        return {"ok": False, "error": type(error).__name__, "reason": _one_line(error)}
    found = {f"{warning.category.__name__}: {warning.message}"[:200] for warning in caught}
    return {"ok": True, "seconds": time.perf_counter() - start, "warnings": sorted(found), **row}


def prepare_for_zoo(network: nn.Module, mode: str) -> nn.Module:
    """Prepares a network; parts that cannot be traced stay float, and count as such in the share."""
    return prepare(network, backend="x86", mode=mode, untraceable="float")


def _ours(entry: Entry) -> Row:
    network, inputs = _built(entry)
    work = count_work(network.eval(), Inputs(inputs[:1], {}))
    network = _with_part(network, entry, lambda part: prepare_for_zoo(part, entry.mode))
    _train(network, inputs)
    prepared = network.get_submodule(entry.part).eval()
    inputs = _inputs_of_part(network, entry, inputs)
    with torch.no_grad():
        expected = _flat(_outputs(prepared, inputs))
        jittered = _flat(_jittered(prepared, inputs))
    int8 = convert(prepared)
    with torch.no_grad():
        found = _flat(_outputs(int8, inputs))
    became = {n for n, m in int8.named_modules() if type(m).__module__.startswith("torch.ao.nn")}
    prefix = f"{entry.part}." if entry.part else ""
    int8_macs = sum(macs for layer, macs in work.layers.items() if layer.removeprefix(prefix) in became)
    figures = {
        "share": int8_macs / work.total,
        "sqnr": sqnr(expected, found),
        "floor": sqnr(expected, jittered),
    }
    recipe = recipe_of(prepared)
    assert recipe is not None
    return {**figures, "untraceable": recipe.untraceable}


def _torch(entry: Entry) -> Row:
    network, inputs = _built(entry)

    def prepared(part: nn.Module) -> nn.Module:
        example = (torch.randn(2, 3, entry.size, entry.size),)
        return prepare_qat_fx(part.train(), get_default_qat_qconfig_mapping("x86"), example)

    network = _with_part(network, entry, prepared)
    _train(network, inputs)
    inputs = _inputs_of_part(network, entry, inputs)
    with torch.no_grad():
        part: Any = network.get_submodule(entry.part).eval()
        expected = _flat(_outputs(part, inputs))
        found = _flat(_outputs(convert_fx(part), inputs))
    same = expected.shape == found.shape
    return {"sqnr": sqnr(expected, found) if same else math.nan}


def _built(entry: Entry) -> tuple[nn.Module, tuple[Any, ...]]:
    """Returns the network and its inputs. Batch-norm keeps the statistics of the last batch alone.

    A last layer that starts at zero gets weights, or all outputs would be equal whatever int8 does.
    """
    network = entry.build()
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    return network.train(), entry.inputs()


def _with_part(network: nn.Module, entry: Entry, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    changed = change(network.get_submodule(entry.part))
    if not entry.part:
        return changed
    network.set_submodule(entry.part, changed)
    return network


def _inputs_of_part(network: Any, entry: Entry, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (network.transform(inputs[0])[0].tensors,) if entry.part else inputs


def _train(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Trains one step, and runs a forward with the weights that it left."""
    network.train()
    torch.manual_seed(1)
    outputs = _outputs(network, inputs)
    losses = [leaf.float().sub(1).square().mean() for leaf in outputs]
    torch.stack(losses).sum().backward()
    torch.optim.SGD(network.parameters(), lr=1e-4).step()
    network.zero_grad()
    with torch.no_grad():
        network(*inputs)


def _outputs(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    leaves = tree_leaves(network(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _jittered(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Returns the outputs with each value a millionth off before rounding, as after sums in another order."""

    def jitter(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return args[0] * (1 + 2**-20 * torch.randn_like(args[0]))

    handles = [
        child.register_forward_pre_hook(jitter)
        for name, child in fake_quantizes(network)
        if not name.endswith("weight_fake_quant")
    ]
    outputs = _outputs(network, inputs)
    for handle in handles:
        handle.remove()
    return outputs


def _flat(outputs: list[Tensor]) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in outputs])


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = next((line for line in lines if line.startswith("at ")), "")
    shown = f"{lines[0] if lines else type(error).__name__} {where}"
    return re.sub(r"\S*/site-packages/", "", shown)[:300]
