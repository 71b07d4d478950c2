"""Writes and reads int8 files and QAT checkpoints, without running code from them."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qat_lightning.base import manifest
from qat_lightning.base.atomic import replacing
from qat_lightning.base.backends import engine
from qat_lightning.base.errors import Int8FileError, RecipeMismatchError
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.base.torch_internals import module_versions, set_module_versions
from qat_lightning.modes.qconfig import Overrides, QConfigLike, stored_overrides, stored_qconfig
from qat_lightning.quantize.convert import convert_in_place
from qat_lightning.quantize.copies import replace_submodule
from qat_lightning.quantize.earlier_names import transposed_in_float
from qat_lightning.quantize.patterns import is_function, token_of
from qat_lightning.quantize.prepare import prepare
from qat_lightning.quantize.recipe import STATE_KEY, Recipe, attach, quantized_networks, recipe_of, recipes_in
from qat_lightning.quantize.selection import resolve_overrides, split_overrides
from qat_lightning.quantize.stored_example import restore

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_FORMAT = "qat-lightning int8"


def save_int8(module: nn.Module, path: str | Path) -> Path:
    """Writes an int8 module to a file that :func:`load_int8` reads.

    The file holds tensors and the recipe, but no code. It is written to a temporary file and then renamed,
    so an interrupted write leaves no partial file.

    Args:
        module: What :func:`qat_lightning.convert` returned, or `qat.int8_module`.
        path: Where to write. The folder is created if needed.

    Returns:
        The path.

    Raises:
        ValueError: `module` holds no int8 network.
    """
    if not any(recipe.int8 for _, _, recipe in quantized_networks(module)):
        raise ValueError(
            f"save_int8 takes a module that `convert` returned, but {type(module).__name__} holds no "
            "int8 network. Call convert(module) first."
        )
    path = Path(path)
    content = {"format": _FORMAT, "version": 1, "state_dict": module.state_dict()}
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(content, file)
    manifest.add(path)
    return path


def load_int8(
    path: str | Path,
    module: ModuleT,
    *,
    qconfig: QConfigLike | None = None,
    overrides: Overrides | None = None,
    verify: bool = True,
) -> ModuleT:
    """Loads an int8 file into a freshly built float module of the class that was trained.

    Args:
        path: A file that :func:`save_int8` wrote.
        module: A freshly built float module: the LightningModule, or the bare network inside it. Use only
            the returned module afterwards.
        qconfig: Your own QConfig, if the network was prepared with one.
        overrides: The overrides, if any of them was your own QConfig.
        verify: Whether to compare the file's checksum with the `manifest.json` beside it, before anything is
            parsed.

    Returns:
        The int8 module, on the CPU in eval mode. Its outputs equal those of the saved module bit for bit.

    Raises:
        FileNotFoundError: There is no such file.
        Int8FileError: The file is not an int8 file, is damaged, is not in the manifest, or belongs to another
            network.
        RecipeMismatchError: The network was prepared with a user-defined QConfig that differs from `qconfig`.
    """
    content = _read(Path(path), verify=verify)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise Int8FileError(
            f"{path} is not an int8 file of qat-lightning. load_int8 reads files that save_int8 wrote. For a "
            "checkpoint of a QAT run use load_qat_checkpoint."
        )
    try:
        state_dict, recipes = _fit_to(module, content["state_dict"])
    except (ValueError, KeyError) as error:
        raise Int8FileError(f"{path} is damaged: it holds no readable recipe. ({error!r})") from error
    user_defined = _user_defined(module, recipes, qconfig, overrides or {})
    try:
        int8 = convert_in_place(_prepare_all(module, recipes, user_defined))
        _check_shapes(int8.state_dict(), state_dict)
        with quiet_torch_ao():
            load_packed(int8, state_dict)
    except (RuntimeError, ValueError, AttributeError, KeyError) as error:
        raise Int8FileError(f"{path} does not fit {type(module).__name__}: {error}") from error
    return int8


def load_packed(int8: nn.Module, state_dict: dict[str, Any]) -> None:
    """Loads a state dict into an int8 module, and packs the weights of each network for its engine."""
    int8.load_state_dict(state_dict)
    for name, network, recipe in quantized_networks(int8):
        if recipe.lowering == "plain":
            continue
        from qat_lightning.modes.native.kernels import pack_weights

        with engine(recipe.backend):
            network.load_state_dict(_inside(state_dict, name))
        pack_weights(network, recipe.backend)


def load_qat_checkpoint(
    path: str | Path,
    module: ModuleT,
    *,
    qconfig: QConfigLike | None = None,
    overrides: Overrides | None = None,
) -> ModuleT:
    """Loads a Lightning checkpoint of a QAT run into a prepared module, outside the run.

    Args:
        path: A checkpoint that ModelCheckpoint or `trainer.save_checkpoint` wrote during a QAT run.
        module: A freshly built float module: the LightningModule, or the bare network inside it. Use only
            the returned module afterwards.
        qconfig: Your own QConfig, if the run had one.
        overrides: The overrides, if any of them was your own QConfig.

    Returns:
        The prepared module in eval mode, with observers and fake-quantization on or off as they were.
        Evaluate it, or pass it to :func:`qat_lightning.convert`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint of a QAT run.
        RecipeMismatchError: `module` is not of the class that was trained, or needs another `qconfig`.
    """
    content = _read(Path(path))
    if isinstance(content, dict) and content.get("format") == _FORMAT:
        raise ValueError(f"{path} is an int8 file, not a checkpoint of a QAT run. Read it with load_int8.")
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not recipes_in(state_dict):
        raise ValueError(
            f"{path} is not a checkpoint of a QAT run: no quantization recipe is in it. For a float "
            f"checkpoint use {type(module).__name__}.load_from_checkpoint or load_state_dict."
        )
    state_dict, recipes = _fit_to(module, state_dict)
    user_defined = _user_defined(module, recipes, qconfig, overrides or {})
    prepared = _prepare_all(module, recipes, user_defined)
    prepared.load_state_dict(state_dict)
    return prepared.eval()


def _read(path: Path, *, verify: bool = False) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    content = io.BytesIO(manifest.read(path, verify=verify))
    try:
        with quiet_torch_ao():
            return torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise Int8FileError(
            f"{path} cannot be read: it is damaged, truncated or not a PyTorch file, or it holds objects "
            f"other than tensors and plain values, which are never loaded. ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _fit_to(module: nn.Module, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Recipe]]:
    """Returns the state dict and its recipes under the names that `module` has.

    A file of a LightningModule with a single network also loads into that bare network.
    """
    recipes = recipes_in(state_dict)
    if not recipes:
        raise ValueError("There is no recipe in the state dict.")
    missing = [name for name in recipes if name and not _has(module, name)]
    if not missing:
        return state_dict, recipes
    if len(recipes) > 1:
        raise RecipeMismatchError(
            f"The file holds the networks {sorted(recipes)}, but {type(module).__name__} has no "
            f"{missing[0]!r}. Pass a module of the class that was trained."
        )
    return _inside(state_dict, missing[0]), {"": recipes[missing[0]]}


def _inside(state_dict: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the part of a state dict that belongs to the submodule `name`, with its module versions."""
    prefix = f"{name}." if name else ""
    inner = OrderedDict((k.removeprefix(prefix), v) for k, v in state_dict.items() if k.startswith(prefix))
    versions = {
        key.removeprefix(name).removeprefix("."): value
        for key, value in module_versions(state_dict).items()
        if key == name or key.startswith(prefix)
    }
    set_module_versions(inner, versions)
    return inner


def _check_shapes(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises a `ValueError` if shapes differ between two int8 state dicts. torch.ao would load any shape."""
    for name, value in expected.items():
        if not name.endswith(STATE_KEY) and name in found and _shapes(found[name]) != _shapes(value):
            raise ValueError(
                f"{name!r} has the shape {_shapes(value)} in the module, but {_shapes(found[name])} in the "
                "file."
            )


def _shapes(value: Any) -> Any:
    """Returns the shape of a tensor, or of each tensor in packed parameters."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return [_shapes(item) for item in value] if isinstance(value, tuple | list) else None


def _has(module: nn.Module, name: str) -> bool:
    return any(known == name for known, _ in module.named_modules(remove_duplicate=False))


def _user_defined(
    module: nn.Module, recipes: dict[str, Recipe], qconfig: QConfigLike | None, overrides: Overrides
) -> dict[str, dict[str, Any]]:
    """Returns, for each network, the arguments of `prepare` that files do not hold: user-defined QConfigs."""
    called = frozenset(token_of(pattern) for pattern in overrides if is_function(pattern))
    split = split_overrides([module.get_submodule(name) for name in recipes], overrides, lambda _: called)
    return {
        name: {
            "qconfig": stored_qconfig(recipe.qconfig, qconfig),
            "overrides": stored_overrides(
                recipe.overrides, resolve_overrides(module.get_submodule(name), given, lambda _: called)
            ),
        }
        for (name, recipe), given in zip(recipes.items(), split, strict=True)
    }


def _prepare_all(
    module: ModuleT, recipes: dict[str, Recipe], user_defined: dict[str, dict[str, Any]]
) -> ModuleT:
    for name, recipe in sorted(recipes.items()):  # a module comes before the networks inside it
        network = module.get_submodule(name)
        floating = transposed_in_float(network, recipe.layers) if recipe.mode == "fx" else []
        prepared = prepare(
            network,
            backend=recipe.backend,
            mode=recipe.mode,
            keep_float=[*recipe.keep_float, *floating],
            fuse=recipe.fuse,
            replace_relu6=recipe.replace_relu6,
            operations=recipe.operations,
            untraceable="float" if recipe.untraceable else "error",
            example_inputs=None if recipe.example is None else restore(recipe.example),
            **user_defined[name],
        )
        own = recipe_of(prepared)
        assert own is not None
        lowering = (recipe.lowering or "native") if recipe.int8 else None  # version 0.1.0 knew no other
        attach(prepared, replace(own, unseen=recipe.unseen, lowering=lowering))
        module = replace_submodule(module, name, prepared)
    return module
