"""The recipe of a prepared network: everything that decides its graph and its qparams, as JSON.

The network's state dict holds the recipe under the key `_qat_recipe`. The JSON is stored as a uint8 tensor,
because many tools expect only tensors in a state dict. Loading a state dict compares its recipe with the
network's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base.errors import RecipeMismatchError
from qat_lightning.base.torch_internals import load_hooks, saves_with
from qat_lightning.modes.graph import behaviour
from qat_lightning.quantize.earlier_names import rename

STATE_KEY = "_qat_recipe"
FULL_BYTES = "quint8 [0, 255]"
"""In `Recipe.grid`, the dtype and range of 8-bit activations."""
_ATTRIBUTE = "qat_recipe"


@dataclass(frozen=True)
class Recipe:
    """How a network was prepared.

    Attributes:
        backend: The engine that the int8 network runs on.
        mode: `"eager"` or `"fx"`.
        qconfig: `"default"`, or the fingerprint of a user-defined QConfig, which must be passed again.
        keep_float: Resolved names of the submodules and functions that stayed float.
        fuse: `"auto"`, or the groups that were passed or found.
        replace_relu6: Whether ReLU6 became ReLU.
        layers: Names of the layers whose weights are quantized.
        grid: For each fake-quantize its observer, scheme, dtype and range of integers.
        overrides: For each overridden layer, module or function, a backend or the fingerprint of a QConfig.
        operations: What modules and functions were declared to do, by name.
        relu6: How many ReLU6 became ReLU; not compared.
        untraceable: Name and line of each submodule that stayed float because it could not be traced.
        int8: Whether the network has been converted.
        versions: Versions of the packages that prepared the network; not compared.
        example: The example that the graph was captured from, see
            :mod:`qat_lightning.quantize.stored_example`. None if it was traced symbolically, in eager mode,
            or if the example cannot be stored. Not compared.
        unseen: In an int8 network, the fake-quantizes that saw no floating-point data, such as those behind
            lengths: the network has no rounding there. Not compared.
        numbering: Of the names of the fake-quantizes; 1 in files of version 0.1.0.
        lowering: In an int8 network, `"plain"` or `"native"`: see
            :meth:`qat_lightning.modes.base.Mode.convert`. Not compared.
    """

    backend: str
    mode: str
    qconfig: str
    keep_float: tuple[str, ...]
    fuse: str | tuple[tuple[str, ...], ...]
    replace_relu6: bool
    layers: tuple[str, ...]
    grid: dict[str, str]
    int8: bool = False
    overrides: dict[str, str] = field(default_factory=dict)
    operations: dict[str, str] = field(default_factory=dict)
    untraceable: tuple[str, ...] = ()
    relu6: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    example: str | None = None
    unseen: tuple[str, ...] = ()
    numbering: int = 1
    lowering: str | None = None

    @property
    def fills_bytes(self) -> bool:
        """Whether activations use 8 bits. On CPUs without VNNI, int8 kernels then overflow."""
        return any(FULL_BYTES in described for described in self.grid.values())

    def to_json(self) -> str:
        """Returns the recipe as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Reads a recipe that `to_json` wrote, and ignores fields that later versions have added."""
        values: dict[str, Any] = json.loads(text)
        fields = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("keep_float", "layers", "untraceable", "unseen"):
            fields[name] = tuple(fields.get(name, ()))
        if not isinstance(fields["fuse"], str):
            fields["fuse"] = tuple(tuple(group) for group in fields["fuse"])
        return cls(**fields)

    def to_tensor(self) -> torch.Tensor:
        """Returns the recipe's JSON as a one-dimensional uint8 tensor."""
        return torch.tensor(list(self.to_json().encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> Recipe:
        """Reads a recipe that `to_tensor` wrote."""
        return cls.from_json(bytes(tensor.tolist()).decode())

    def differences(self, other: Recipe) -> list[str]:
        """Describes what differs between this network's recipe and `other`, that of a state dict.

        Returns:
            One text for each difference in graphs or qparams. Empty if the recipes are compatible.
        """
        found = [
            f"{name} is {getattr(self, name)!r} in the network and {getattr(other, name)!r} in the state dict"
            for name in ("mode", "int8", "operations")
            if getattr(self, name) != getattr(other, name)
        ]
        found += _compare_names("quantized layers", set(self.layers), set(other.layers))
        if not found:
            found += _compare_names("fake-quantizes", set(self.grid), set(other.grid))
        changed = [n for n, g in self.grid.items() if other.grid.get(n, g) != g]
        if changed:
            first = changed[0]
            found.append(
                f"the qparams of {len(changed)} fake-quantizes differ, the first being {first!r}: "
                f"{self.grid[first]} in the network and {other.grid[first]} in the state dict"
            )
        return found


def _compare_names(what: str, network: set[str], state: set[str]) -> list[str]:
    if network == state:
        return []
    only_network, only_state = sorted(network - state)[:3], sorted(state - network)[:3]
    return [f"the {what} differ: only the network has {only_network}, only the state dict has {only_state}"]


def attach(network: nn.Module, recipe: Recipe) -> None:
    """Attaches `recipe` to `network` and its copies. State dicts then hold it, and loading compares it."""
    if isinstance(network, fx.GraphModule):
        behaviour.attach(network, {_ATTRIBUTE: recipe})
    else:
        setattr(network, _ATTRIBUTE, recipe)
    if not saves_with(network, _save):
        network.register_state_dict_post_hook(_save)
        network.register_load_state_dict_pre_hook(_load)


def recipe_of(network: nn.Module) -> Recipe | None:
    """Returns the recipe that `network` was prepared with, or None if it is float."""
    return getattr(network, _ATTRIBUTE, None)


def quantized_networks(module: nn.Module) -> Iterator[tuple[str, nn.Module, Recipe]]:
    """Yields name, network and recipe of every prepared or int8 network in `module`, itself included."""
    for name, child in module.named_modules():
        recipe = recipe_of(child)
        if recipe is not None:
            yield name, child, recipe


def recipes_in(state_dict: dict[str, Any]) -> dict[str, Recipe]:
    """Returns the recipes in a state dict, by the name of the network (`""` for the module itself)."""
    return {
        key.removesuffix(STATE_KEY).rstrip("."): Recipe.from_tensor(value)
        for key, value in state_dict.items()
        if key == STATE_KEY or key.endswith("." + STATE_KEY)
    }


def refuse_prepared_states(module: nn.Module) -> None:
    """Makes a float module refuse the state dict of a prepared one with a clear error."""
    if _refuse_prepared not in load_hooks(module):
        module.register_load_state_dict_pre_hook(_refuse_prepared)


def _refuse_prepared(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    floating = {name for name, child in module.named_modules() if recipe_of(child) is None}
    kind = type(module).__name__
    for name in recipes_in({key.removeprefix(prefix): value for key, value in state_dict.items()}):
        if name in floating:
            raise RecipeMismatchError(
                f"This checkpoint is from a QAT run, in which {name or kind!r} is prepared for quantization, "
                f"but here it is float. Call module = qat_lightning.load_qat_checkpoint(path, {kind}(…)) and "
                "use that module without ckpt_path. To continue the training, call trainer.fit(ckpt_path=…) "
                "with the QuantizationAwareTraining callback."
            )


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    recipe = recipe_of(module)
    if recipe is not None:
        state_dict[prefix + STATE_KEY] = recipe.to_tensor()


def _load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    recipe = recipe_of(module)
    stored = state_dict.pop(prefix + STATE_KEY, None)
    if recipe is None:
        return
    if stored is None:
        raise RecipeMismatchError(
            f"The network {prefix.rstrip('.') or type(module).__name__!r} is prepared for quantization, "
            "but this state dict is from a float network: a float checkpoint. Load float weights into the "
            "module before trainer.fit, by load_from_checkpoint or load_state_dict (on the command line "
            "weights=…), and leave ckpt_path out; or resume from a checkpoint of a QAT run."
        )
    other = Recipe.from_tensor(stored)
    grid = other.grid
    if other.numbering == 1 and recipe.mode == "fx":
        grid = rename(module, state_dict, prefix, recipe.grid, grid)
    differences = recipe.differences(replace(other, grid=grid))
    if differences:
        raise RecipeMismatchError(
            "This state dict was made with another quantization recipe than the network "
            f"{prefix.rstrip('.') or type(module).__name__!r} is prepared with: "
            f"{'; '.join(differences)}. Prepare the network with the same backend, mode, qconfig, "
            "keep_float, accuracy_target and fuse, or start again from the float weights."
        )
