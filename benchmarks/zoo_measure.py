"""What the zoo does with one network: train a step with fake-quantization, convert, and compare."""

from __future__ import annotations

import math
import re
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from benchmarks.zoo_entry import Entry
from benchmarks.zoo_models import entries
from qat_lightning import convert, prepare
from qat_lightning.analysis.preflight.inventory import count_work
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.nested import tensors_in
from qat_lightning.base.sqnr import sqnr
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.modes.lowering.int8.layers import Int8Layer
from qat_lightning.quantize.recipe import recipe_of

Row = dict[str, Any]
_INT8 = (Int8Layer, quantized.Linear, quantized.Conv1d, quantized.Conv2d, quantized.Conv3d)


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
    entry = next(entry for entry in entries() if entry.name == name)
    try:
        network, inputs = _built(entry), entry.call()
        start = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always" if way == "ours" else "ignore")
            row = _WAYS[way](entry, network, inputs)
    except Exception as error:
        return {"ok": False, "error": type(error).__name__, "reason": _one_line(error)}
    found = {f"{warning.category.__name__}: {warning.message}"[:200] for warning in caught}
    return {"ok": True, "seconds": time.process_time() - start, "warnings": sorted(found), **row}


def _ours(entry: Entry, network: nn.Module, inputs: Inputs) -> Row:
    """Prepares from an example in fx mode. Parts that cannot be traced stay float."""
    of_part = _inputs_of_part(network, entry, inputs)
    example = of_part if entry.mode == "fx" else None
    total = count_work(network.eval(), Inputs(inputs.args[:1], inputs.kwargs)).total

    def prepared_part(part: nn.Module) -> nn.Module:
        return prepare(
            part.train(), backend="x86", mode=entry.mode, untraceable="float", example_inputs=example
        )

    network = _with_part(network, entry, prepared_part)
    _train(network, inputs)
    prepared = network.get_submodule(entry.part).eval()
    with torch.no_grad():
        expected = _flat(_outputs(prepared, of_part))
        jittered = _flat(_jittered(prepared, of_part))
    int8 = convert(prepared)
    work: Counter[str] = Counter()
    _count_int8(int8, work)
    with torch.no_grad():
        found = _flat(_outputs(int8, of_part))
    recipe = recipe_of(prepared)
    assert recipe is not None
    return {
        "share": work.total() / total,
        "sqnr": sqnr(expected, found),
        "floor": sqnr(expected, jittered),
        "untraceable": recipe.untraceable,
        "captured": recipe.example is not None,
    }


def _count_int8(int8: nn.Module, work: Counter[str]) -> None:
    """Notes the multiply-adds of each int8 layer in `work` when it runs."""

    def note(name: str) -> Any:
        def count(layer: Any, args: Any, output: Tensor) -> None:
            weight = layer.weight if isinstance(layer, Int8Layer) else layer.weight()
            work[name] += output.numel() * weight[0].numel()

        return count

    for name, layer in int8.named_modules():
        if isinstance(layer, _INT8):
            layer.register_forward_hook(note(name))


def _torch(entry: Entry, network: nn.Module, inputs: Inputs) -> Row:
    """Does the same as PyTorch alone does it, with the same example."""
    of_part = _inputs_of_part(network, entry, inputs)
    example = (*of_part.args, *of_part.kwargs.values())

    def prepared_part(part: nn.Module) -> nn.Module:
        return prepare_qat_fx(part.train(), get_default_qat_qconfig_mapping("x86"), example)

    network = _with_part(network, entry, prepared_part)
    _train(network, inputs)
    with torch.no_grad():
        part: Any = network.get_submodule(entry.part).eval()
        expected = _flat(_outputs(part, of_part))
        found = _flat(_outputs(convert_fx(part), of_part))
    same = expected.shape == found.shape
    return {"sqnr": sqnr(expected, found) if same else math.nan}


_WAYS = {"ours": _ours, "torch": _torch}


def _built(entry: Entry) -> nn.Module:
    """Returns the network. Batch-norm keeps the statistics of the last batch alone.

    A last layer that starts at zero gets weights, or all outputs would be equal whatever int8 does.
    """
    network = entry.build()
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    return network.train()


def _with_part(network: nn.Module, entry: Entry, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    changed = change(network.get_submodule(entry.part))
    if not entry.part:
        return changed
    network.set_submodule(entry.part, changed)
    return network


def _inputs_of_part(network: Any, entry: Entry, inputs: Inputs) -> Inputs:
    return Inputs((network.transform(inputs.args[0])[0].tensors,), {}) if entry.part else inputs


def _train(network: nn.Module, inputs: Inputs) -> None:
    """Trains one step, and runs a forward with the weights that it left."""
    network.train()
    torch.manual_seed(1)
    losses = [leaf.float().sub(1).square().mean() for leaf in _outputs(network, inputs)]
    torch.stack(losses).sum().backward()
    torch.optim.SGD(network.parameters(), lr=1e-4).step()
    network.zero_grad()
    with torch.no_grad():
        network(*inputs.args, **inputs.kwargs)


def _outputs(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    leaves = tensors_in(network(*inputs.args, **inputs.kwargs))
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _jittered(network: nn.Module, inputs: Inputs) -> list[Tensor]:
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
