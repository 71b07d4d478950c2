"""Loads state dicts of earlier versions.

The same fake-quantizes, or the same scales of an int8 graph, have other names in them, and transposed
convolutions are float.

Version 0.1.0 numbered the fake-quantizes of a graph in the same order, but left out some numbers, and wrote a
shared one under each of its places. It named the scales of an int8 graph after what reads them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from qat_lightning.base.torch_internals import ConvTranspose

_NUMBERED = re.compile(r"activation_post_process_(\d+)")
_QPARAMS = re.compile(r"\w*_(scale|zero_point)_\d+")


def rename(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, own: dict[str, str], stored: dict[str, str]
) -> dict[str, str]:
    """Gives the entries of a state dict the names that they have in `module`, in place.

    Args:
        module: The prepared or int8 network.
        state_dict: The state dict that is about to load.
        prefix: The prefix of the network's names.
        own: The fake-quantizes of the network, in words, by name.
        stored: Those of the state dict.

    Returns:
        `stored`, with the names of the network. Unchanged if the two do not have as many fake-quantizes.
    """
    old, new = _numbered(stored), _numbered(own)
    if old == new or len(old) != len(new):
        return stored
    names = dict(zip(old, new, strict=True))
    _rename_fake_quantizes(module, state_dict, prefix, names)
    _rename_qparams(module, state_dict, prefix)
    return {names.get(name, name): described for name, described in stored.items()}


def transposed_in_float(network: nn.Module, layers: Collection[str]) -> list[str]:
    """Returns the names of the transposed convolutions of a float network that are not among `layers`."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if name and isinstance(module, ConvTranspose):
            names.setdefault(module, []).append(name)
    return [each[0] for each in names.values() if not {*each} & {*layers}]


def _numbered(names: Iterable[str]) -> list[str]:
    numbers = {name: int(found[1]) for name in names if (found := _NUMBERED.fullmatch(name))}
    return sorted(numbers, key=numbers.__getitem__)


def _rename_fake_quantizes(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, names: dict[str, str]
) -> None:
    numbered = [key for key in state_dict if _NUMBERED.match(key.removeprefix(prefix))]
    entries = {key: state_dict.pop(key) for key in numbered}
    places = dict(module.named_modules(remove_duplicate=False))
    for key, value in entries.items():
        name, _, rest = key.removeprefix(prefix).partition(".")
        first = places[names[name]] if name in names else None
        for place in (place for place, each in places.items() if each is first):
            state_dict[f"{prefix}{place}.{rest}"] = value


def _rename_qparams(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    own = [name for name, _ in module.named_buffers(recurse=False) if _QPARAMS.fullmatch(name)]
    inside = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    stored = [name for name in inside if _QPARAMS.fullmatch(name)]
    if len(own) == len(stored):
        values = [state_dict.pop(prefix + name) for name in stored]
        state_dict.update({prefix + name: value for name, value in zip(own, values, strict=True)})
