"""Runs a module on the user's batches to compute a metric, or to collect the inputs of its networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from qat_lightning.analysis.scoring import lone_trainer, validate
from qat_lightning.base.errors import nearest
from qat_lightning.base.inputs import Inputs, device_of
from qat_lightning.base.torch_internals import tree_leaves, tree_map

Metric = str | Callable[[Any, Any], float]


class Batches:
    """The first `count` batches of a loader, the same at every pass. All batches if `count` is None."""

    def __init__(self, loader: Iterable[Any], count: int | None) -> None:
        self._batches = loader if count is None else list(islice(loader, count))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def inputs_of(network: nn.Module, batch: Any) -> Inputs:
    """Returns the part of a batch that the forward of `network` takes, so that labels are left out.

    From a mapping it takes the entries with the names of arguments. From a sequence it takes the first
    elements, one for each required positional argument.
    """
    parameters = list(inspect.signature(network.forward).parameters.values())
    if isinstance(batch, Mapping):
        names = {p.name for p in parameters}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return Inputs((), {str(k): v for k, v in batch.items() if takes_any or k in names})
    if not isinstance(batch, Sequence):
        return Inputs((batch,), {})
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return Inputs(tuple(batch), {})
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    return Inputs(tuple(batch)[: max(required, 1)], {})


def collect_inputs(
    module: nn.Module, networks: Mapping[str, nn.Module], batches: Batches
) -> dict[str, list[Inputs]]:
    """Collects copies of each network's inputs while `module` runs its `validation_step` or its forward.

    Raises:
        ValueError: No network was called.
    """
    found: dict[str, list[Inputs]] = {name: [] for name in networks}

    def keep(calls: list[Inputs]) -> Any:
        def hook(network: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(Inputs(*tree_map(_copied, (args, kwargs))))

        return hook

    handles = [
        network.register_forward_pre_hook(keep(found[name]), with_kwargs=True)
        for name, network in networks.items()
    ]
    try:
        if _validates(module):
            _validate(module, batches)
        else:
            for _ in _outputs(module, batches):
                pass
    finally:
        for handle in handles:
            handle.remove()
    if not any(found.values()):
        raise ValueError(
            f"The networks of {type(module).__name__} must run on the dataloader's batches, but none of "
            f"{list(networks)} was called. Pass a dataloader that has batches, and call the networks in "
            "`validation_step`."
        )
    return {name: calls for name, calls in found.items() if calls}


def score(module: nn.Module, metric: Metric, batches: Batches) -> float:
    """Returns a metric of a module in eval mode: one that it logs in validation, or the mean of a function.

    Raises:
        ValueError: The module logs no metric of that name, or there are no batches.
    """
    if isinstance(metric, str):
        logged = _validate(module, batches)
        if metric not in logged:
            raise ValueError(
                f"metric={metric!r} must be a metric that `validation_step` of {type(module).__name__} logs, "
                f"but it logs {sorted(logged)}. {nearest(metric, logged)}"
            )
        return logged[metric]
    total, count = 0.0, 0
    for outputs, batch in _outputs(module, batches):
        samples = count_samples(batch)
        total += float(metric(outputs, batch)) * samples
        count += samples
    if not count:
        raise ValueError("The dataloader has no batches to compute the metric on. Pass one that has batches.")
    return total / count


def check_metric(module: nn.Module, metric: object) -> None:
    """Raises if `metric` is neither a function nor a name that `module` may log."""
    if not isinstance(metric, str) and not callable(metric):
        raise TypeError(
            "metric must be a function of (outputs, batch), or the name of a metric that a LightningModule's "
            f"`validation_step` logs, but received {metric!r}."
        )
    if isinstance(metric, str) and not _validates(module):
        raise ValueError(
            f"metric={metric!r} names a metric, but {type(module).__name__} has no `validation_step` that "
            "could log it. Pass a LightningModule that has one, or a function: "
            "metric=lambda outputs, batch: …"
        )


def _validates(module: nn.Module) -> bool:
    return isinstance(module, pl.LightningModule) and is_overridden("validation_step", module)


def _outputs(module: nn.Module, batches: Batches) -> Iterator[tuple[Any, Any]]:
    """Yields the outputs of `module` on each batch, and the batch."""
    device = device_of(module)
    for batch in batches:
        moved = move_data_to_device(batch, device)
        inputs = inputs_of(module, moved)
        with torch.no_grad():
            outputs = module(*inputs.args, **inputs.kwargs)
        yield outputs, moved


def _validate(module: Any, batches: Batches) -> dict[str, float]:
    device = device_of(module)
    logged = validate(lone_trainer(device, inference_mode=False), module, batches)
    module.to(device)  # Lightning leaves it on the CPU
    return logged


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def count_samples(batch: Any) -> int:
    """Returns the batch size: the first dimension of the first tensor in nested values, or 1 without one."""
    return next((v.shape[0] for v in tree_leaves(batch) if isinstance(v, torch.Tensor) and v.ndim), 1)
