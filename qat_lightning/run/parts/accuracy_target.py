"""The accuracy target of a run: a search before training finds the layers that stay float.

Networks are prepared in `setup`, before Lightning restores a checkpoint. At that time it is not known whether
there is a checkpoint, nor which layers it keeps float. Its state dict holds a recipe that names them. So when
the state dict is loaded, networks that do not match the recipe are prepared again, and the result of the
search is discarded.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.base.errors import RecipeMismatchError, TargetError
from qat_lightning.quantize.copies import replace_submodule
from qat_lightning.quantize.networks import keeping_as, network_names, prepare_module, stored_examples
from qat_lightning.quantize.options import Settings
from qat_lightning.quantize.recipe import recipe_of, recipes_in
from qat_lightning.run.distributed.merge_ranges import keep_out_of_ddp_broadcast
from qat_lightning.run.distributed.processes import fail_together, gather
from qat_lightning.run.part import Part
from qat_lightning.run.parts.target_search import search, what_to_measure


@dataclass(frozen=True)
class AccuracyTarget:
    """How much of a metric int8 may lose before training. A few layers stay float to reach it.

    At the start of fit, :func:`qat_lightning.keep_for_target` finds these layers on the validation data. They
    stay float in addition to `keep_float`. The module must hold trained weights. A resumed run keeps the
    layers that it started with.

    Args:
        max_drop: By how many percentage points the metric may fall. For a metric between 0 and 1, 0.5 allows
            a fall from 0.900 to 0.895; for a percentage between 0 and 100, from 90.0 to 89.5.
        metric: Name of the metric, as `validation_step` logs it. By default the one that the first
            ModelCheckpoint monitors.
        mode: `"max"` if a higher metric is better, `"min"` if a lower one is. By default the mode of the
            callback that monitors it.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of the wrong type.
    """

    max_drop: float = 0.5
    metric: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_drop, bool) or not isinstance(self.max_drop, int | float):
            raise TypeError(
                f"max_drop must be a number of percentage points, but received {self.max_drop!r}."
            )
        if not 0 <= self.max_drop < math.inf:
            raise ValueError(f"max_drop must be at least 0 and finite, but received {self.max_drop}.")
        if self.metric is not None and not isinstance(self.metric, str):
            raise TypeError(
                "metric must be the name of a metric that `validation_step` logs, or None, but received "
                f"{self.metric!r}. qat_lightning.keep_for_target takes functions."
            )
        if self.mode not in ("max", "min", None):
            raise ValueError(f"mode must be 'max', 'min' or None, but received {self.mode!r}.")


class Found(NamedTuple):
    """The result of a search: names for `keep_float`, or an error to raise unless weights are loaded."""

    names: tuple[str, ...] = ()
    failure: Exception | None = None


class LayerSearch(Part):
    """Searches for the layers that stay float. A resumed run keeps the layers that it started with.

    Args:
        target: The accuracy target; None for no search.
    """

    def __init__(self, target: AccuracyTarget | None) -> None:
        self._target = target
        self._found = Found()
        self._stored: _Stored | None = None
        self._handle: RemovableHandle | None = None

    @property
    def is_set(self) -> bool:
        """Returns whether there is a target."""
        return self._target is not None

    # Before the run.

    def choose(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        settings: Settings,
        earlier: Collection[nn.Module],
    ) -> Settings:
        """Searches on rank 0 for all ranks. Every rank must call it.

        Args:
            trainer: The Trainer, in `setup`.
            module: The module whose networks are about to be prepared.
            settings: How to prepare them.
            earlier: The networks that an earlier fit has prepared. If `module` still holds them, there is no
                search.

        Returns:
            `settings`, with the layers that were found added to `keep_float`.
        """
        self._stop_listening()
        if self._target is None:
            return settings
        with fail_together("searching for the layers to keep float"):
            networks = {name: module.get_submodule(name) for name in network_names(module, settings)}
            if earlier and all(network in earlier for network in networks.values()):
                self._raise_failure()
                return settings
            _check_float(networks.values())
            # A module that is a network itself cannot be made float again.
            repeatable = "" not in networks
            expects_weights = repeatable and bool(trainer.ckpt_path)
            found = Found(failure=_not_loaded(trainer) if expects_weights else None)
            if trainer.is_global_zero and not expects_weights:
                found = self._search(trainer, module, settings)
        self._found = gather(found)[0]
        self._stored = _Stored(settings, _sharing_copies(module, networks) if repeatable else None)
        self._handle = module.register_load_state_dict_pre_hook(self._stored)
        return replace(settings, keep_float=(*settings.keep_float, *self._found.names))

    def settle(self, module: pl.LightningModule) -> bool:
        """Ends the time in which loading weights can change the layers.

        Returns:
            Whether networks were prepared again.

        Raises:
            TargetError: The search failed, and no weights were loaded. The networks are float again.
        """
        stored = self._stored
        self._stop_listening()
        if stored is None:
            return False
        if stored.loaded is not None:
            self._found = Found(stored.loaded)
        elif self._found.failure is not None:
            stored.restore_float(module)
            self._raise_failure()
        return stored.prepared_again

    def state_dict(self) -> dict[str, Any]:
        """Returns the target and the layers that were found, as plain values."""
        if self._target is None:
            return {"target": None}
        return {"target": {"max_drop": self._target.max_drop, "kept": list(self._found.names)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Warns if a resumed run has another target than the one that it started with."""
        started_with = None if state.get("target") is None else state["target"]["max_drop"]
        if self._target is not None and started_with != self._target.max_drop:
            rank_zero_warn(
                f"The run was started with max_drop={started_with} and keeps its layers. The value passed "
                f"now, {self._target.max_drop}, has no effect. To change it, start anew from the weights."
            )

    def _search(self, trainer: pl.Trainer, module: pl.LightningModule, settings: Settings) -> Found:
        assert self._target is not None
        metric, mode = what_to_measure(trainer, self._target.metric, self._target.mode)
        try:
            return Found(search(trainer, module, settings, self._target.max_drop, metric, mode))
        except TargetError as error:
            return Found(failure=error.with_traceback(None))  # a traceback would keep all copies alive

    def _raise_failure(self) -> None:
        if self._found.failure is not None:
            raise self._found.failure

    def _stop_listening(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._stored = self._handle = None


class _Stored:
    """A load-state-dict pre-hook that prepares networks again if the loaded recipes keep other layers float.

    Attributes:
        loaded: The layers that the loaded recipes keep float; None before weights are loaded.
        prepared_again: Whether networks were prepared again.
    """

    def __init__(self, settings: Settings, networks: dict[str, nn.Module] | None) -> None:
        self.loaded: tuple[str, ...] | None = None
        self.prepared_again = False
        self._settings, self._networks = settings, networks

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Compares the recipes. `module` is the hooked module or a copy of it."""
        state = {key.removeprefix(prefix): each for key, each in state_dict.items() if key.startswith(prefix)}
        stored = recipes_in(state)
        if not stored:
            return
        self.loaded = tuple(dict.fromkeys(chain.from_iterable(r.keep_float for r in stored.values())))
        if not any(_differs(module, name, recipe.keep_float) for name, recipe in stored.items()):
            return
        if self._networks is None:
            raise RecipeMismatchError(
                f"The resumed run keeps {list(self.loaded)} float, but the search on the weights that this "
                f"{type(module).__name__} was built with found other layers. The module has layers itself, "
                f"so it cannot be prepared again. Pass keep_float={list(self.loaded)} instead of "
                f"accuracy_target."
            )
        self.restore_float(module)
        prepare_module(module, keeping_as(self._settings, stored), stored_examples(stored))
        keep_out_of_ddp_broadcast(module)
        self.prepared_again = True
        rank_zero_info(f"Kept float by the run that is resumed: {', '.join(self.loaded) or 'nothing'}")

    def restore_float(self, module: nn.Module) -> None:
        """Puts the float networks back into `module`, unless `module` is a network itself."""
        for name, network in (self._networks or {}).items():
            replace_submodule(module, name, network)


def _differs(module: nn.Module, name: str, keep_float: Iterable[str]) -> bool:
    try:
        recipe = recipe_of(module.get_submodule(name))
    except AttributeError:  # the weights belong to another module, and loading them raises its own error
        return False
    return recipe is not None and set(recipe.keep_float) != set(keep_float)


def _sharing_copies(module: nn.Module, networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns copies of float networks that share all parameters and buffers with `module`."""
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(networks, shared)  # type: ignore[arg-type]


def _check_float(networks: Iterable[nn.Module]) -> None:
    for network in networks:
        if recipe_of(network) is not None:
            raise ValueError(
                f"An accuracy target decides which layers stay float before a network is prepared, but this "
                f"{type(network).__name__} is prepared already. Start from the float network, or leave out "
                f"accuracy_target: its float layers stay float."
            )


def _not_loaded(trainer: pl.Trainer) -> Exception:
    return MisconfigurationException(
        f"trainer.ckpt_path is {trainer.ckpt_path}, so that checkpoint should have decided which layers stay "
        "float, but no weights were loaded. Use a new Trainer, or set trainer.ckpt_path = None before fit."
    )
