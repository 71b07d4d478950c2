"""`prepare`: fuses a float network and inserts fake-quantization, so that it trains for int8."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Unpack

import torch
from torch import nn

from qat_lightning.base import random_state
from qat_lightning.base.inputs import Inputs, first_samples
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.base.torch_internals import BatchNorm, parameters_of
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.modes import Mode, ModeResult, Options, choose_mode, get_mode
from qat_lightning.modes.purity.structure import structural_copy
from qat_lightning.modes.qconfig import describe, qconfig_name
from qat_lightning.modes.trace.one_thread import ONE_AT_A_TIME
from qat_lightning.quantize.batch_norms import store_batch_norm_classes
from qat_lightning.quantize.example_inputs import as_inputs
from qat_lightning.quantize.floating import check_float
from qat_lightning.quantize.options import PrepareOptions, Settings
from qat_lightning.quantize.recipe import Recipe, attach
from qat_lightning.quantize.selection import (
    names_to_declare,
    resolve_keep_float,
    resolve_operations,
    resolve_overrides,
)
from qat_lightning.quantize.stored_example import store

_VERSIONS = {name: version(name) for name in ("qat-lightning", "torch")}


def prepare(
    network: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | torch.Tensor | None = None,
    **options: Unpack[PrepareOptions],
) -> nn.Module:
    """Fuses a float network and inserts fake-quantization, ready for training.

    Steps 1 to 4 of PyTorch's eager and FX workflows for quantization-aware training
    (https://docs.pytorch.org/docs/stable/quantization.html).

    Args:
        network: A float network. Do not use it afterwards: the result shares its parameters, and in eager
            mode it is the same object.
        example_inputs: An example of a call: a tuple of positional arguments, a mapping of keyword
            arguments, or a tensor. In fx mode the graph is captured while a copy runs on it. The forward may
            then decide by sizes, optional arguments and values: the graph takes the example's path, and an
            input that would take another raises :class:`qat_lightning.GuardError`. Without an example the
            forward is traced symbolically, and its path may depend on nothing but the mode. Eager mode needs
            an example only if the network cannot be traced. Two samples are enough.
        **options: How the network is prepared: backend, qconfig, mode, keep_float, fuse, replace_relu6,
            overrides, operations and untraceable, see :class:`qat_lightning.PrepareOptions`.

    Returns:
        The prepared network, in the mode (training or eval) that `network` was in.

    Raises:
        ValueError: The network is quantized already, holds nothing to quantize, cannot be traced
            (fx) or lacks stubs or fusions (eager); a name, backend or mode is unknown.
        TypeError: An argument is of the wrong type.
    """
    settings = Settings.of(options, "prepare", one_network=True)
    return prepare_with(settings, network, None if example_inputs is None else as_inputs(example_inputs))


def prepare_with(
    settings: Settings, network: nn.Module, example: Inputs | None = None, *, tried: bool = False
) -> nn.Module:
    """Prepares like :func:`prepare`, with the settings of a callback.

    Args:
        settings: How to prepare the network.
        network: The network.
        example: An example of a call, or None.
        tried: Whether the network was tried before, or is the copy to try: it is then prepared only once.
    """
    example = None if example is None else type(example)(*first_samples(tuple(example)))
    check_float(network)
    with ONE_AT_A_TIME:
        return _prepare_as(network, settings, example, tried)


def _prepare_as(network: nn.Module, settings: Settings, example: Inputs | None, tried: bool) -> nn.Module:
    mode = get_mode(choose_mode(network, settings.mode)[0])
    resolved = _resolve(network, mode, settings, example)
    with quiet_torch_ao():
        if not mode.prepares_in_place(network):
            return _prepare_a_copy(network, mode, resolved)
        if not tried:
            with random_state.preserved():
                _prepare(trial_copy(network), mode, resolved)
        return _prepare(network, mode, resolved)


def trial_copy(network: nn.Module) -> nn.Module:
    """Returns a structural copy with its own batch-norm scales, since preparing may replace zeros in them."""
    copy = structural_copy(network)
    for module in copy.modules():
        scale = parameters_of(module).get("weight") if isinstance(module, BatchNorm) else None
        if scale is not None:
            parameters_of(module)["weight"] = nn.Parameter(scale.detach().clone(), scale.requires_grad)
    return copy


def _prepare_a_copy(network: nn.Module, mode: Mode, options: Options) -> nn.Module:
    """Prepares a copy that shares all tensors with `network`. If that fails, nothing has changed."""
    state = random_state.capture()
    try:
        return _prepare(structural_copy(network), mode, options)
    except BaseException:
        random_state.restore(state)
        raise


def _prepare(network: nn.Module, mode: Mode, options: Options) -> nn.Module:
    options = mode.check(network, options)
    result = mode.prepare(network, options)
    recipe = _recipe(result, mode.name, options)
    attach(result.network, recipe)
    store_batch_norm_classes(result.network)
    return result.network


def _resolve(network: nn.Module, mode: Mode, settings: Settings, example: Inputs | None) -> Options:
    """Turns patterns into the names of what they match in `network`."""
    declared = names_to_declare(network, settings.operations or {})

    @functools.cache
    def functions(network: nn.Module) -> frozenset[str] | None:
        return mode.functions(network, settings.untraceable, example, declared)

    operations = resolve_operations(network, settings.operations or {}, functions)
    overrides = resolve_overrides(network, settings.overrides or {}, functions)
    floating = [name for name, value in overrides.items() if value is None]
    kept = resolve_keep_float(network, [*settings.keep_float, *floating], functions)
    return Options(
        backend=settings.backend,
        qconfig=settings.qconfig,
        keep_float=kept,
        fuse=settings.fuse,
        replace_relu6=settings.replace_relu6,
        overrides={name: value for name, value in overrides.items() if value is not None},
        operations=operations,
        untraceable=settings.untraceable,
        example_inputs=example,
    )


def _recipe(made: ModeResult, mode: str, options: Options) -> Recipe:
    grid = {name: describe(child) for name, child in fake_quantizes(made.network)}
    suffix = ".weight_fake_quant"
    layers = tuple(name.removesuffix(suffix) for name in grid if name.endswith(suffix))
    if not layers:
        raise ValueError(
            f"Nothing is left to quantize: keep_float={options.keep_float}, the qconfig and what cannot be "
            f"traced ({', '.join(made.untraceable) or 'nothing'}) keep every layer float. Keep fewer."
        )
    fuse = options.fuse
    return Recipe(
        backend=options.backend,
        mode=mode,
        qconfig=qconfig_name(options.qconfig),
        keep_float=options.keep_float,
        fuse=fuse if isinstance(fuse, str) else tuple(tuple(group) for group in fuse),
        replace_relu6=options.replace_relu6,
        overrides={name: qconfig_name(value) for name, value in options.overrides.items()},
        operations=dict(options.operations),
        untraceable=made.untraceable,
        relu6=made.relu6,
        example=None if made.captured is None else store(made.captured),
        layers=layers,
        grid=grid,
        versions=_VERSIONS,
        numbering=2,
    )
