"""Prepares the networks inside a module, in place."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from qat_lightning.base import random_state
from qat_lightning.base.errors import RecipeMismatchError, UntraceableError
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.base.torch_internals import load_hooks
from qat_lightning.modes import choose_mode, get_mode
from qat_lightning.modes.graph.graft import calls
from qat_lightning.modes.qconfig import qconfig_name
from qat_lightning.quantize.copies import replace_submodule
from qat_lightning.quantize.example_inputs import Examples
from qat_lightning.quantize.floating import check_not_quantized
from qat_lightning.quantize.options import Settings
from qat_lightning.quantize.prepare import prepare_with, trial_copy
from qat_lightning.quantize.recipe import Recipe, quantized_networks, recipe_of, recipes_in
from qat_lightning.quantize.selection import (
    check_modules,
    find_networks,
    names_to_declare,
    split_operations,
    split_overrides,
    split_patterns,
)
from qat_lightning.quantize.stored_example import restore


@dataclass(frozen=True)
class Prepared:
    """One prepared network.

    Attributes:
        name: Its name in the module, `""` for the module itself.
        network: The network.
        recipe: How it was prepared.
        reason: Why it was prepared in that mode.
    """

    name: str
    network: nn.Module
    recipe: Recipe
    reason: str

    def __str__(self) -> str:
        kept = f", {len(self.recipe.keep_float)} kept float" if self.recipe.keep_float else ""
        if self.recipe.untraceable:
            kept += f", not traceable and float: {', '.join(self.recipe.untraceable)}"
        if self.recipe.relu6:
            kept += f", {self.recipe.relu6} ReLU6 became ReLU"
        captured = ", captured from an example" if self.recipe.example else ""
        return (
            f"{self.name or type(self.network).__name__}: {len(self.recipe.layers)} layers for "
            f"{self.recipe.backend} in {self.recipe.mode} mode ({self.reason}{captured}){kept}"
        )


def prepare_module(
    module: nn.Module, settings: Settings, known: Mapping[str, Inputs | None] | None = None
) -> list[Prepared]:
    """Prepares the networks that `settings` select, in place. Networks that are prepared already stay.

    Args:
        module: The module.
        settings: How to prepare them.
        known: Examples of their calls, by name, see :class:`Examples`.

    Raises:
        ValueError: There is no network, a network cannot be prepared, or was prepared differently before.
    """
    names = network_names(module, settings)
    examples = Examples(module, known, names)
    several = len(names) > 1
    if several:  # otherwise, if the second fails, the first would stay prepared
        with random_state.preserved():
            _prepare_all(trial_copy(module), names, settings, examples, tried=True)
    return _prepare_all(module, names, settings, examples, tried=several)


def _prepare_all(
    module: nn.Module, names: Sequence[str], settings: Settings, examples: Examples, *, tried: bool
) -> list[Prepared]:
    networks = [module.get_submodule(name) for name in names]
    floating = {name: n for name, n in zip(names, networks, strict=True) if recipe_of(n) is None}
    settings_of = _split(floating, settings, examples) if floating else {}
    return [
        _again(name, network, settings)
        if name not in settings_of
        else _prepare(module, name, network, settings_of[name], examples, tried)
        for name, network in zip(names, networks, strict=True)
        if not (name and calls(module, name))  # else it is part of the module's own graph, which comes first
    ]


def prepare_when_loaded(module: nn.Module, settings: Settings, *, keep_as_loaded: bool = False) -> None:
    """Prepares a float `module` when the weights of a QAT run are loaded into it, and not before.

    Args:
        module: The module.
        settings: How to prepare it.
        keep_as_loaded: Whether the layers that the run kept float stay float here too.
    """
    if not any(getattr(hook, "func", None) is _prepare_for for hook in load_hooks(module)):
        module.register_load_state_dict_pre_hook(partial(_prepare_for, settings, keep_as_loaded))


def keeping_as(settings: Settings, recipes: Mapping[str, Recipe]) -> Settings:
    """Returns `settings` that also keep float what these recipes keep float."""
    names = dict.fromkeys(name for recipe in recipes.values() for name in recipe.keep_float)
    return replace(settings, keep_float=(*settings.keep_float, *names))


def stored_examples(recipes: Mapping[str, Recipe]) -> dict[str, Inputs | None]:
    """Returns the example that each network was captured from; None for one that was not captured."""
    return {name: None if r.example is None else restore(r.example) for name, r in recipes.items()}


def _prepare_for(
    settings: Settings, keep_as_loaded: bool, module: nn.Module, state_dict: dict[str, Any], *_: Any
) -> None:
    recipes = recipes_in(state_dict)
    if not recipes or next(quantized_networks(module), None) is not None:
        return
    if "" in network_names(module, settings):  # its own keys are being loaded already
        kind = type(module).__name__
        raise RecipeMismatchError(
            f"The weights are from a QAT run, but this {kind} is float, and it cannot be prepared while they "
            f"are loaded, because it has layers itself. Call qat_lightning.load_qat_checkpoint(path, "
            f"{kind}(...)), and pass the module that it returns to the Trainer, without ckpt_path."
        )
    settings = keeping_as(settings, recipes) if keep_as_loaded else settings
    prepare_module(module, settings, stored_examples(recipes))


def _split(networks: Mapping[str, nn.Module], settings: Settings, examples: Examples) -> dict[str, Settings]:
    """Returns settings for each network, with only the names that match in it."""
    names = {network: name for name, network in networks.items()}
    operations = settings.operations or {}

    @functools.cache
    def functions(network: nn.Module) -> frozenset[str] | None:
        mode = get_mode(choose_mode(network, settings.mode)[0])
        declared = names_to_declare(network, operations)
        return mode.functions(network, settings.untraceable, examples.of(names[network]), declared)

    kept = split_patterns([*networks.values()], settings.keep_float, functions)
    overrides = split_overrides([*networks.values()], settings.overrides or {}, functions)
    declared = split_operations([*networks.values()], operations, functions)
    return {
        name: replace(settings, keep_float=k, overrides=o, operations=d)
        for name, k, o, d in zip(networks, kept, overrides, declared, strict=True)
    }


def network_names(module: nn.Module, settings: Settings) -> tuple[str, ...]:
    """Returns the names of the networks to prepare. `""` stands for the module itself, and comes first.

    Raises:
        ValueError: There is nothing to quantize.
    """
    recipe = recipe_of(module)
    if settings.modules is not None and recipe is None:
        return check_modules(module, settings.modules)
    found = find_networks(module)
    if recipe is not None or found.loose:
        mode = choose_mode(module, settings.mode)[0] if recipe is None else recipe.mode
        others = [] if mode == "eager" else [n for n in found.networks if not calls(module, n)]
        return ("", *others)
    if not found.networks:
        check_not_quantized(module)
        raise ValueError(
            f"{type(module).__name__} holds no network with convolutions or linear layers, so there is "
            "nothing to quantize. A network that `setup` builds does not exist yet when the callback "
            "prepares it: build it in `__init__`, or in `configure_model`:\n"
            "    def configure_model(self):\n"
            "        if self.model is None:\n"
            "            self.model = build()"
        )
    return found.networks


def _again(name: str, network: nn.Module, settings: Settings) -> Prepared:
    """Describes a network that was prepared before, by an earlier fit or by the user."""
    recipe = recipe_of(network)
    assert recipe is not None
    with quiet_torch_ao():
        qconfig = qconfig_name(settings.qconfig)
    wanted = {"backend": settings.backend, "qconfig": qconfig}
    if settings.mode != "auto":
        wanted["mode"] = settings.mode
    wrong = {k: v for k, v in wanted.items() if getattr(recipe, k) != v}
    if recipe.int8 or wrong:
        raise ValueError(
            f"The network {name or type(network).__name__!r} is quantized already, "
            + (
                "converted to int8"
                if recipe.int8
                else f"with {', '.join(f'{k}={getattr(recipe, k)!r}' for k in wrong)}"
            )
            + f", but this run asks for {wanted}. Start from the float network, or ask for the same."
        )
    return Prepared(name, network, recipe, "prepared before")


def _prepare(
    module: nn.Module, name: str, network: nn.Module, settings: Settings, examples: Examples, tried: bool
) -> Prepared:
    mode, reason = choose_mode(network, settings.mode)
    settings = replace(settings, mode=mode)
    example = examples.of(name) if mode == "fx" else None
    try:
        prepared = prepare_with(settings, network, example, tried=tried)
    except UntraceableError:
        example = examples.of(name) if mode == "eager" else None
        if example is None:
            raise
        prepared = prepare_with(settings, network, example, tried=tried)
    replace_submodule(module, name, prepared)
    recipe = recipe_of(prepared)
    assert recipe is not None
    if prepared is module and mode == "fx":
        outside = [n for n in find_networks(module).loose if not calls(module, n)]
        reason += f"; {', '.join(outside)} stay float, since forward does not call them" if outside else ""
    return Prepared(name, prepared, recipe, reason)
