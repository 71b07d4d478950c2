"""Finds the groups of modules to fuse in eager mode, or checks the groups that the user lists.

A group is one that torch.ao fuses for training, such as a convolution with the batch-norm and the ReLU after
it. The int8 network runs it as one operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from qat_lightning.base.errors import UntraceableError, nearest
from qat_lightning.base.torch_internals import all_forward_hooks
from qat_lightning.modes.base import Options
from qat_lightning.modes.eager.graph_flow import traced, traced_parts
from qat_lightning.modes.eager.watched_flow import watched
from qat_lightning.modes.graph.flow import Flow, follower
from qat_lightning.modes.graph.lines import user_line
from qat_lightning.modes.graph.relu6 import is_inside, is_relu6_module

Group = tuple[str, ...]

_CONVS_AND_NORMS = (
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.BatchNorm3d),
)
_FUSABLE: set[tuple[type[nn.Module], ...]] = {
    *_CONVS_AND_NORMS,
    *((conv, norm, nn.ReLU) for conv, norm in _CONVS_AND_NORMS),
    *((conv, nn.ReLU) for conv, _ in _CONVS_AND_NORMS),
    (nn.Linear, nn.ReLU),
    (nn.Linear, nn.BatchNorm1d),
    (nn.BatchNorm2d, nn.ReLU),
    (nn.BatchNorm3d, nn.ReLU),
}
_ALLOWED = (
    "A group may be a Conv1d, Conv2d or Conv3d with the BatchNorm of the same dimensions, with a ReLU, or "
    "with both in this order; a Linear with a ReLU or BatchNorm1d; or a BatchNorm2d or BatchNorm3d with a "
    "ReLU."
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def find_groups(network: nn.Module, options: Options) -> tuple[Group, ...]:
    """Finds the groups of modules that can be fused without changing what `network` computes.

    Raises:
        UntraceableError: For some batch-norms the layer before them is unknown: the forward cannot be traced,
            and there are no example inputs to watch it with.
        ValueError: The network does not run on the example inputs.
    """
    kept = options.keep_float
    try:
        return _match(network, traced(network, kept), options)
    except Exception as error:  # a forward may raise anything when it gets proxies
        if options.example_inputs is not None:
            return _match(network, watched(network, options.example_inputs, kept), options)
        groups = _match(network, list(traced_parts(network, kept)), options)
        fused = {name for group in groups for name in group}
        norms = [n for n, m in network.named_modules() if isinstance(m, NORMS) and n not in fused]
        unknown = [name for name in norms if not is_inside(name, kept)]
        if unknown:
            raise UntraceableError(_unknown_message(network, unknown, error)) from error
        return groups


def _unknown_message(network: nn.Module, norms: list[str], error: Exception) -> str:
    return (
        "Eager mode fuses each BatchNorm into the layer before it, but torch.fx cannot trace "
        f"{type(network).__name__}, so the layer is unknown for {norms[:3]}{' …' if len(norms) > 3 else ''}: "
        f"{error}\n  at {user_line(error, network)}\n"
        "Pass example_inputs=(…,) for one forward pass that shows it (a LightningModule has "
        "example_input_array for this); or list the fusions, as in fuse=[['conv1', 'bn1', 'relu1'], …]; or "
        "rewrite that line and use mode='fx', which finds the fusions in the graph."
    )


def _match(network: nn.Module, flows: Sequence[Flow], options: Options) -> tuple[Group, ...]:
    """Returns the longest fusable group that starts at each module, in the order of the forward."""
    modules = dict(_candidates(network, options.keep_float))
    taken: set[str] = set()
    groups = []
    for name in dict.fromkeys(name for flow in flows for name in flow.readers):
        chain = list(_chain(name, flows, modules, taken))
        while len(chain) > 1 and _obstacle([modules[n] for n in chain], options.replace_relu6):
            chain.pop()
        if len(chain) > 1:
            groups.append(tuple(chain))
            taken.update(chain)
    return tuple(groups)


def _chain(
    name: str | None, flows: Sequence[Flow], modules: dict[str, nn.Module], taken: set[str]
) -> Iterator[str]:
    """Yields `name` and up to two modules after it, if nothing else reads the tensors between them."""
    for _ in range(3):
        if name is None or name not in modules or name in taken:
            return
        yield name
        name = follower(name, flows)


def _candidates(network: nn.Module, keep_float: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that may be fused: registered once, not kept float, without hooks."""
    named = list(network.named_modules(remove_duplicate=False))
    registrations = Counter(module for _, module in named)
    for name, module in named:
        attached = all_forward_hooks(module) or parametrize.is_parametrized(module)
        if registrations[module] == 1 and not attached and not is_inside(name, keep_float):
            yield name, module


def _obstacle(modules: Sequence[Any], replace_relu6: bool) -> str | None:
    """Returns the reason why `modules` cannot be fused for training; None if they can."""
    kinds = tuple(nn.ReLU if replace_relu6 and is_relu6_module(m) else type(m) for m in modules)
    if any(is_relu6_module(m) for m in modules) and nn.ReLU not in kinds:
        return "a ReLU6 is fused only where it becomes a ReLU (replace_relu6=True)"
    if kinds not in _FUSABLE:
        return "torch.ao cannot fuse these for training"
    norm = next((m for m in modules if isinstance(m, NORMS)), None)
    if norm is None:
        return None
    channels = getattr(modules[0], "out_features", getattr(modules[0], "out_channels", norm.num_features))
    if norm.num_features != channels:
        return f"the layer has {channels} output channels and the batch-norm {norm.num_features}"
    if not norm.affine or not norm.track_running_stats:
        return "the batch-norm needs affine=True and track_running_stats=True"
    return None


def check_groups(network: nn.Module, options: Options) -> tuple[Group, ...]:
    """Returns the groups of `options.fuse` if each can be fused.

    Raises:
        TypeError: `options.fuse` is not a list of groups of names.
        ValueError: A name is unknown or in two groups, or torch.ao cannot fuse a group.
    """
    groups = options.fuse
    if isinstance(groups, str) or any(isinstance(group, str) for group in groups):
        raise TypeError(
            "fuse must be 'auto' or a list of groups of module names, as in "
            f"[['conv1', 'bn1', 'relu1']], but received {groups!r}."
        )
    known = dict(network.named_modules(remove_duplicate=False))
    first: dict[nn.Module, str] = {}
    for name in (name for group in groups for name in group):
        if name not in known or not name:
            raise ValueError(
                f"fuse names the module {name!r}, which {type(network).__name__} does not have. "
                f"{nearest(name, [n for n in known if n])}"
            )
        if known[name] in first:
            other = first[known[name]]
            same = "" if other == name else f", the same module as {other!r}"
            raise ValueError(f"fuse names the module {name!r}{same} twice, but a module is fused only once.")
        first[known[name]] = name
    for group in groups:
        _check_group(group, [known[name] for name in group], options)
    return tuple(tuple(group) for group in groups)


def _check_group(group: Sequence[str], modules: list[nn.Module], options: Options) -> None:
    floating = [name for name in group if is_inside(name, options.keep_float)]
    if len(group) < 2:
        reason: str | None = "a group has two or three modules"
    elif floating and len(floating) < len(group):
        reason = f"keep_float keeps {floating[0]!r} float and not the others"
    else:
        reason = _obstacle(modules, options.replace_relu6 and not floating)
    if reason is not None:
        kinds = ", ".join(type(module).__name__ for module in modules) or "no module"
        raise ValueError(f"fuse has the group {list(group)} ({kinds}), but {reason}. {_ALLOWED}")
