"""Distillation: adds the divergence from a frozen float teacher's logits to the user's loss.

The user's `training_step` does not change. No hook of Lightning can replace the loss, so the term is added in
the backward pass: when the gradient of the loss reaches the network's logits, the gradient of the term is
added to it, scaled like the loss. By the chain rule the result is the gradient of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.base import random_state
from qat_lightning.base.inputs import is_redirected
from qat_lightning.base.torch_internals import tree_leaves, tree_map
from qat_lightning.run import trainer_facts
from qat_lightning.run.part import Part
from qat_lightning.run.parts import teachers
from qat_lightning.run.parts.divergence import divergence, logits_of

METRIC = "train/distillation"


@dataclass(frozen=True)
class Distillation:
    """The teacher whose logits the network learns in addition to its labels.

    `training_step` need not change: the gradient of the divergence from the teacher is added to that of its
    loss. The divergence is logged as `train/distillation` (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531).

    Args:
        teacher: `"self"`, the float network with its weights at the call of `fit`; another float network; or
            a mapping from the names of several networks to their teachers. A teacher is copied and frozen,
            and checkpoints do not hold it.
        weight: Factor of the divergence. 1 by default: the divergence then weighs as much as a cross entropy
            averaged over the batch.
        temperature: Divides the logits of both networks before the softmax. 1 by default: the network learns
            the teacher's own probabilities. Higher values soften them.

    Raises:
        ValueError: A value is out of range, or the teacher is quantized.
        TypeError: A value is of the wrong type.
    """

    teacher: teachers.TeacherLike = teachers.SELF
    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("temperature", self.temperature)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, but received {value!r}.")
            if not 0 < value < math.inf:
                fix = " For no distillation, pass distillation=None." if name == "weight" else ""
                raise ValueError(f"{name} must be above 0 and finite, but received {value}.{fix}")
        object.__setattr__(self, "teacher", teachers.copied(self.teacher))


class Term(NamedTuple):
    """The term that one call of a network adds to the loss: the weighted divergence.

    Attributes:
        value: The term.
        gradient: Its gradient with respect to the logits.
        size: The size of the batch.
    """

    value: Tensor
    gradient: Tensor
    size: int


class Teaching(Part):
    """Runs each teacher on its network's inputs, and adds the gradient of the divergence.

    Args:
        distillation: The teacher, its weight and the temperature, or None.
    """

    def __init__(self, distillation: Distillation | None) -> None:
        self._distillation = distillation
        self._by_name: dict[str, nn.Module] = {}
        self._teachers: dict[nn.Module, nn.Module] = {}
        self._names: dict[nn.Module, str] = {}
        self._fingerprint: str | None = None
        self._resumed: list[dict[str, Any] | None] = []
        self._hooks: list[RemovableHandle] = []
        self._teacher_logits: dict[nn.Module, Tensor] = {}
        self._added: list[Term] = []
        self._loss_scale: float | None = None  # None outside the backward pass of the loss
        self._scaler: Any = None
        self._steps_before: int | None = None  # None once a term was added to a gradient

    # Before the run.

    def before_prepare(self, trainer: pl.Trainer, module: pl.LightningModule, names: Sequence[str]) -> None:
        requested = None if self._distillation is None else self._distillation.teacher
        self._by_name = teachers.take(requested, module, names, self._teachers)
        self._resumed = []

    def after_prepare(self, module: pl.LightningModule, networks: Mapping[str, nn.Module]) -> None:
        """Assigns the teachers to the prepared `networks`."""
        self._by_name = {name: teacher for name, teacher in self._by_name.items() if name in networks}
        self._teachers = {networks[name]: teacher for name, teacher in self._by_name.items()}
        self._names = {networks[name]: name for name in self._by_name}
        self._fingerprint = teachers.fingerprint(self._by_name) if self._by_name else None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Moves the teachers to the run's device, and checks that a resumed run has the same teachers.

        Raises:
            MisconfigurationException: The module is compiled.
            ValueError: The resumed run had another teacher.
        """
        if self._teachers:
            if trainer_facts.is_compiled(module):
                raise MisconfigurationException(
                    "Distillation adds to the gradient with hooks on the networks, and compiled code does "
                    "not call hooks reliably. Leave torch.compile out, or the teacher."
                )
            for teacher in self._teachers.values():
                teacher.to(module.device)
            if teachers.share(self._teachers.values()):
                self._fingerprint = teachers.fingerprint(self._by_name)
            self._steps_before = trainer.global_step
        self._check_resumed()

    def state_dict(self) -> dict[str, Any]:
        """Returns what must be the same in a resumed run, as plain values: no weights, only their hash."""
        return {"teacher": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keeps the loaded values until the teachers can be compared."""
        self._resumed = [state.get("teacher")]

    def _identity(self) -> dict[str, Any] | None:
        if self._fingerprint is None or self._distillation is None:
            return None
        return {
            "weights": self._fingerprint,
            "weight": float(self._distillation.weight),
            "temperature": float(self._distillation.temperature),
        }

    def _check_resumed(self) -> None:
        resumed, self._resumed = self._resumed, []
        present = self._identity()
        if not resumed or resumed[0] == present:
            return
        raise ValueError(
            "A resumed run has to continue with the teacher that it started with, but it started with "
            f"{_describe(resumed[0])}, and this one has {_describe(present)}. Pass the same arguments, and "
            "build the module with the weights that the run started from, before the checkpoint is loaded. "
            "Or start a new run from the checkpoint's weights, without ckpt_path."
        )

    # At every training batch. Hooks are removed after each, since copies of the networks would keep them.

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Adds the hooks to the networks."""
        self._remove_hooks()
        for network in self._teachers:
            self._hooks.append(network.register_forward_pre_hook(self._run_teacher, with_kwargs=True))
            self._hooks.append(network.register_forward_hook(self._compare))

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Stores the scale of the loss before its backward pass."""
        self._loss_scale = 1 / trainer.accumulate_grad_batches if module.automatic_optimization else 1.0
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stops adding, so that other backward passes, such as a gradient penalty's, do not change."""
        self._loss_scale = self._scaler = None

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Logs the term, and removes the hooks.

        Raises:
            MisconfigurationException: The optimizer has made a step, but no term was added to a gradient.
        """
        added = self._added
        self._remove_hooks()
        if added:
            self._steps_before = None
            module.log(
                METRIC,
                torch.stack([term.value for term in added]).sum(),
                on_step=False,
                on_epoch=True,
                batch_size=added[0].size,
                sync_dist=trainer.world_size > 1,
            )
        elif self._steps_before is not None and trainer.global_step > self._steps_before:
            names = ", ".join(map(self._name, self._teachers))
            raise MisconfigurationException(
                f"The optimizer has made a step, but the teacher of {names} had no part in its gradient. "
                "`training_step` must call the network in training mode and with gradients, and its loss "
                "must depend on the network's output. Under manual optimization, call "
                "self.manual_backward(loss) instead of loss.backward()."
            )

    def _remove_hooks(self) -> None:
        """Removes the hooks and resets the state of a batch."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._added = [], []
        self._teacher_logits.clear()
        self._loss_scale = self._scaler = None

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._end()

    def _end(self) -> None:
        """Removes the hooks, and moves the teachers off the device."""
        self._remove_hooks()
        for teacher in self._teachers.values():
            teacher.cpu()

    # The term.

    def _run_teacher(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs the teacher before the network, since the network may overwrite its input."""
        if not network.training or not torch.is_grad_enabled() or is_redirected(network):
            return
        if any(isinstance(v, Tensor) and v.grad_fn is not None for v in tree_leaves((args, kwargs))):
            raise ValueError(
                f"The input of {self._name(network)} comes out of other trained layers. They change during "
                "training, so the teacher would get inputs that it was not trained on. Put both into one "
                "network, as in nn.Sequential(backbone, head), or name the networks that learn: "
                'Distillation(teacher={"model": "self"}).'
            )
        with torch.no_grad(), random_state.preserved():
            args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
            output = self._teachers[network](*args, **kwargs)
            self._teacher_logits[network] = logits_of(output, f"the teacher of {self._name(network)}")

    def _compare(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Computes the term, and registers a hook that adds its gradient to that of the logits."""
        theirs = self._teacher_logits.pop(network, None)
        if theirs is None:
            return
        logits = logits_of(output, self._name(network))
        if logits.shape != theirs.shape:
            raise ValueError(
                f"The logits of {self._name(network)} have the shape {tuple(logits.shape)}, but those of its "
                f"teacher {tuple(theirs.shape)}. A teacher must have the same classes and resolution."
            )
        if logits.requires_grad and self._distillation is not None:
            value, gradient = divergence(logits, theirs, self._distillation.temperature)
            weight = self._distillation.weight
            term = Term(weight * value, weight * gradient, len(logits))
            logits.register_hook(partial(self._add, term))

    def _add(self, term: Term, gradient: Tensor) -> Tensor | None:
        if self._loss_scale is None or any(term is added for added in self._added):
            return None
        self._added.append(term)
        added = term.gradient * self._loss_scale
        if self._scaler is not None:
            added = self._scaler.scale(added)
        return gradient + added.to(gradient.dtype)

    def _name(self, network: nn.Module) -> str:
        return repr(self._names[network] or type(network).__name__)


def _describe(state: dict[str, Any] | None) -> str:
    if state is None:
        return "no teacher"
    return (
        f"a teacher whose weights hash to {state['weights'][:12]} (weight={state['weight']}, "
        f"temperature={state['temperature']})"
    )
