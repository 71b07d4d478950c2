"""`convert`: turns a prepared network into an int8 network."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torch import nn

from qat_lightning.base.backends import engine, run_on_engine
from qat_lightning.base.errors import ConversionError
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.fake_quant.phases import set_eval
from qat_lightning.fake_quant.ranges import check_observed, unseen_in
from qat_lightning.modes import get_mode
from qat_lightning.quantize.batch_norms import make_local, restore_batch_norms
from qat_lightning.quantize.copies import copy_of, replace_submodule
from qat_lightning.quantize.nonfinite import first_nonfinite_weight
from qat_lightning.quantize.recipe import attach, quantized_networks

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def convert(module: ModuleT) -> ModuleT:
    """Converts a prepared network, or every prepared network inside a module, to int8.

    This is step 6 of PyTorch's workflow. The given module does not change: a copy is converted, on the CPU
    and in eval mode. Each int8 network in it runs on the engine of its recipe.

    PyTorch has one quantized engine for the whole process. Packing weights needs the engine of the recipe, so
    `convert` switches it and switches it back, and so does each forward of an int8 network. Other threads
    should not run int8 networks of another engine meanwhile.

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
    from qat_lightning.modes.native.kernels import pack_weights
    from qat_lightning.modes.native.stored_qparams import store_qparams

    module = module.cpu().eval()
    make_local(module)
    set_eval(module)
    for name, network, recipe in list(quantized_networks(module)):
        if recipe.int8:
            continue
        restore_batch_norms(network)
        with quiet_torch_ao(), engine(recipe.backend):
            unseen = recipe.unseen or unseen_in(network)  # a file's recipe names them
            converted = get_mode(recipe.mode).convert(network, unseen)
        pack_weights(converted, recipe.backend)
        store_qparams(converted)
        attach(converted, dataclasses.replace(recipe, int8=True, unseen=unseen))
        run_on_engine(converted, recipe.backend)
        module = replace_submodule(module, name, converted.eval())
    return module
