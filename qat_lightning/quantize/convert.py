"""`convert`: turns a prepared network into an int8 network."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torch import nn

from qat_lightning.base.backends import engine, run_on_cpu, run_on_engine, runs_on_plain_tensors
from qat_lightning.base.errors import ConversionError
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.fake_quant.phases import set_eval
from qat_lightning.fake_quant.ranges import check_observed, unseen_in
from qat_lightning.modes import get_mode
from qat_lightning.quantize.batch_norms import make_local, restore_batch_norms
from qat_lightning.quantize.copies import copy_of, replace_submodule
from qat_lightning.quantize.nonfinite import first_nonfinite_weight
from qat_lightning.quantize.recipe import Recipe, attach, quantized_networks

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def convert(module: ModuleT) -> ModuleT:
    """Converts a prepared network, or every prepared network inside a module, to int8.

    This is step 6 of PyTorch's workflow. The given module does not change: a copy is converted, on the CPU
    and in eval mode. Each int8 network in it runs on the engine of its recipe.

    In fx mode an int8 network computes with plain tensors of bytes: it can be pickled, copied, and run by
    several threads. With the backends fbgemm and qnnpack, and in eager mode, it runs on PyTorch's quantized
    tensors. For those PyTorch has one engine for the whole process. Packing weights needs the engine of the
    recipe, so `convert` switches it and switches it back, and so does each forward of such a network. Other
    threads should not run networks of another engine meanwhile.

    Args:
        module: A network that :func:`prepare` returned, or a module that holds such networks, such as a
            LightningModule.

    Returns:
        The copy, with int8 networks.

    Raises:
        ConversionError: The module holds no prepared network, a network has seen no data in training mode, or
            a weight holds a NaN or an infinity.
    """
    prepared = [net for _, net, recipe in quantized_networks(module) if not recipe.int8]
    if not prepared:
        raise ConversionError(
            f"convert takes a network that `prepare` made, or a module that holds one, but received "
            f"{type(module).__name__}, which holds none. Prepare and train it first."
        )
    for network in prepared:
        check_observed(network)
        weight = first_nonfinite_weight(network)
        if weight is not None:
            raise ConversionError(f"{weight!r} holds a NaN or an infinity, which int8 cannot represent.")
    return convert_in_place(copy_of(module))


def convert_in_place(module: ModuleT) -> ModuleT:
    """Converts like :func:`convert`, but in place and without checks."""
    module = module.cpu().eval()
    make_local(module)
    set_eval(module)
    for name, network, recipe in list(quantized_networks(module)):
        if recipe.int8:
            continue
        restore_batch_norms(network)
        unseen = recipe.unseen or unseen_in(network)  # a file's recipe names them
        lowering = recipe.lowering or _lowering(recipe)
        made = dataclasses.replace(recipe, int8=True, unseen=unseen, lowering=lowering)
        converted = _on_engine(network, made) if lowering == "native" else _on_plain_tensors(network, made)
        attach(converted, made)
        module = replace_submodule(module, name, converted.eval())
    return module


def _lowering(recipe: Recipe) -> str:
    return "plain" if recipe.mode == "fx" and runs_on_plain_tensors(recipe.backend) else "native"


def _on_plain_tensors(network: nn.Module, recipe: Recipe) -> nn.Module:
    converted = get_mode(recipe.mode).convert(network, recipe.unseen, "plain")
    run_on_cpu(converted)
    return converted


def _on_engine(network: nn.Module, recipe: Recipe) -> nn.Module:
    """Converts a network for PyTorch's quantized tensors and the engine of its backend."""
    from qat_lightning.modes.native.kernels import pack_weights
    from qat_lightning.modes.native.stored_qparams import store_qparams

    with quiet_torch_ao(), engine(recipe.backend):
        converted = get_mode(recipe.mode).convert(network, recipe.unseen, "native")
    pack_weights(converted, recipe.backend)
    store_qparams(converted)
    run_on_engine(converted, recipe.backend)
    return converted
