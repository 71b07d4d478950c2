"""Prepares networks that need an example: the module's own step, on two samples, shows how it calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from qat_lightning.analysis.batches import Batches
from qat_lightning.analysis.scoring import compute_metrics_alone, lone_trainer
from qat_lightning.base import random_state
from qat_lightning.base.errors import UntraceableError
from qat_lightning.base.inputs import Catcher, Inputs
from qat_lightning.base.torch_internals import tree_map
from qat_lightning.modes import choose_mode
from qat_lightning.modes.trace.symbolic import defaults
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.networks import Prepared, network_names, prepare_module
from qat_lightning.quantize.options import Settings
from qat_lightning.quantize.recipe import recipe_of

Batch = Callable[[], Any]
"""Returns a batch, or None if there is none."""


def prepare_on_batch(module: nn.Module, settings: Settings, batches: Mapping[str, Batch]) -> list[Prepared]:
    """Prepares a module's networks in place; where they need examples, a batch provides them.

    A network needs one if it cannot be traced symbolically, or if its forward has optional arguments, which
    the module may pass.

    Args:
        module: The module. Without an `example_input_array`, a copy of it runs on the batch.
        settings: How to prepare the networks.
        batches: By the name of a step, such as `"validation_step"`, a batch for it. The first step that the
            module has is run.

    Raises:
        ValueError: There is no network, a network cannot be prepared, or the step fails.
    """
    names = network_names(module, settings)
    networks = {name: module.get_submodule(name) for name in names}
    traced = [name for name, network in networks.items() if _is_to_trace(network, settings)]
    if any(defaults(networks[name]) for name in traced):
        return prepare_module(module, settings, examples_of_step(module, traced, batches))
    try:
        return prepare_module(module, settings)
    except UntraceableError:
        examples = examples_of_step(module, traced, batches) if traced else {}
        if not examples:
            raise
        return prepare_module(module, settings, examples)


def _is_to_trace(network: nn.Module, settings: Settings) -> bool:
    """Whether a network is float, and becomes a graph."""
    return recipe_of(network) is None and choose_mode(network, settings.mode)[0] == "fx"


def examples_of_step(
    module: nn.Module, names: Sequence[str], batches: Mapping[str, Batch]
) -> dict[str, Inputs]:
    """Runs a copy of `module` on a batch, on the CPU, until it has called each of its networks.

    The module, its metrics, its loggers and the random generators are left as they were.

    Returns:
        The first call of each network; empty if the module has an `example_input_array`, or no batch.

    Raises:
        ValueError: The step fails on the batch.
    """
    if not isinstance(module, LightningModule) or module.example_input_array is not None:
        return {}
    with random_state.preserved():
        for step, batch_of in batches.items():
            batch = batch_of() if is_overridden(step, module) else None
            if batch is not None:
                return _run(_lone_copy(module), names, step, batch)
    return {}


def _lone_copy(module: LightningModule) -> LightningModule:
    copied = copy_of(module).cpu()
    vars(copied)["configure_callbacks"] = list  # the user's callbacks belong to the run
    compute_metrics_alone(copied)
    return copied


class _AllCalled(Exception):
    """Ends a step as soon as each network has been called."""


def _run(module: LightningModule, names: Sequence[str], step: str, batch: Any) -> dict[str, Inputs]:
    networks = {name: module.get_submodule(name) for name in names}
    with Catcher(networks.values()) as catcher:

        def end(*_: Any) -> None:
            if len(catcher.caught) == len(set(networks.values())):
                raise _AllCalled

        handles = [network.register_forward_pre_hook(end) for network in networks.values()]
        try:
            with suppress(_AllCalled):
                _step(module, step, batch)
        except Exception as error:
            raise ValueError(
                f"To see how its networks are called, a copy of {type(module).__name__} ran its {step} on "
                f"two samples, and that failed: {error} ({type(error).__name__}). Correct it, or give the "
                "module an example_input_array."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    return catcher.named(networks)


def _step(module: LightningModule, step: str, batch: Any) -> None:
    data = Batches([batch], None)
    if step == "training_step":
        lone_trainer(max_steps=1, limit_val_batches=0, num_sanity_val_steps=0).fit(module, data)
    else:
        lone_trainer(inference_mode=False).validate(module, data, verbose=False)


def two_samples(loaders: Any) -> Any:
    """Returns a batch of the first two samples of nested loaders; of another iterable, its first batch."""
    return tree_map(_samples_of, loaders)


def _samples_of(loader: Any) -> Any:
    batched = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if batched and not isinstance(loader.dataset, IterableDataset):
        dataset: Any = loader.dataset
        return loader.collate_fn([dataset[i] for i in range(min(2, len(dataset)))])
    return next(iter(loader), None)
