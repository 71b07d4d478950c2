"""`preflight`: checks before training whether a module would train, convert and run as int8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import nn

from qat_lightning.analysis.preflight.call_location import call_lines
from qat_lightning.analysis.preflight.dry_run import dry_run, stage
from qat_lightning.analysis.preflight.network_report import NetworkReport
from qat_lightning.base import random_state
from qat_lightning.base.errors import PreflightError, UntraceableError
from qat_lightning.base.inputs import Catcher, Inputs, first_samples
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.example_inputs import as_inputs
from qat_lightning.quantize.networks import network_names, prepare_module
from qat_lightning.quantize.options import ModuleOptions, Settings
from qat_lightning.quantize.prepare import prepare


def preflight(
    module: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | torch.Tensor,
    **options: Unpack[ModuleOptions],
) -> list[NetworkReport]:
    """Tries a whole run on a copy, in seconds: prepare, a training step, convert, an int8 forward.

    The module, its batch-norm statistics, its mode and the random generators do not change. Only the first
    samples of the inputs are used.

    Args:
        module: A float LightningModule, whose networks are checked, or a float network.
        example_inputs: Inputs of its forward: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments. The batch needs at least two samples, because of batch-norm.
        **options: How networks are prepared, see :class:`qat_lightning.ModuleOptions`.

    Returns:
        The result for each network that the module's forward calls. Other networks are not checked.

    Raises:
        PreflightError: A network would not train, convert or run; the message names the module, the line
            of its code, and the change that fixes it.
        ValueError: A network cannot be prepared, or an argument is wrong.

    Example::

        for result in preflight(module, torch.randn(2, 3, 224, 224)):
            print(result)
    """
    return preflight_with(Settings.of(options, "preflight"), module, example_inputs)


def preflight_with(settings: Settings, module: nn.Module, example_inputs: Any) -> list[NetworkReport]:
    """Runs :func:`preflight` with the settings of a callback."""
    inputs = Inputs(*first_samples(tuple(as_inputs(example_inputs))))
    with random_state.preserved():
        names = _names(module, settings)
        floating = copy_of(module).cpu()
        caught = _network_inputs(floating, names, inputs)
        try:
            prepared = _prepare(copy_of(module).cpu(), settings, caught)
        except ValueError as error:
            named = _last_named(error, floating, inputs)
            if named is None:
                raise
            name, line = named
            raise PreflightError(f"{error}\n  {name!r} is called at {line}", path=name, line=line) from error
        return [dry_run(name, network, caught[name]) for name, network in prepared if name in caught]


def _last_named(error: ValueError, module: nn.Module, inputs: Inputs) -> tuple[str, str] | None:
    """Returns the last called submodule among those that an error names, and the line that calls it."""
    if isinstance(error, UntraceableError):
        return None  # its message has a line already
    quoted = set(re.findall(r"'([\w.]+)'", str(error).split("Nearest:")[0]))
    with call_lines(module) as lines:
        module(*inputs.args, **inputs.kwargs)
    named = [name for name in lines if any(f".{name}".endswith(f".{part}") for part in quoted)]
    return (named[-1], lines[named[-1]]) if named else None


def _is_whole(module: nn.Module, settings: Settings) -> bool:
    """Returns whether `module` is one network rather than a LightningModule with networks."""
    return settings.modules is None and not hasattr(module, "training_step")


def _names(module: nn.Module, settings: Settings) -> tuple[str, ...]:
    return ("",) if _is_whole(module, settings) else network_names(module, settings)


def _network_inputs(module: nn.Module, names: tuple[str, ...], inputs: Inputs) -> dict[str, Inputs]:
    """Returns the inputs that the module's forward passes to each network."""
    networks = {name: module.get_submodule(name) for name in names}
    with torch.no_grad(), stage("float forward", "", module), Catcher(networks.values()) as catcher:
        module.eval()(*inputs.args, **inputs.kwargs)
    caught = catcher.named(networks)
    if not caught:
        raise ValueError(
            f"preflight runs the forward of {type(module).__name__}, but it calls none of its networks "
            f"{list(names)}. Pass a network itself: preflight(module.{names[0]}, …)."
        )
    return caught


def _prepare(
    module: nn.Module, settings: Settings, caught: Mapping[str, Inputs]
) -> list[tuple[str, nn.Module]]:
    if not _is_whole(module, settings):
        return [(p.name, p.network) for p in prepare_module(module, settings, caught)]
    return [("", prepare(module, example_inputs=Inputs(*caught[""]), **settings.options))]
