"""The texts of the callback's log lines, warnings and errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from qat_lightning.base import cpu
from qat_lightning.base.schedule import Phase, ResolvedSchedule, Schedule
from qat_lightning.quantize.networks import Prepared
from qat_lightning.quantize.recipe import Recipe
from qat_lightning.run import trainer_facts

_HIGH_LEARNING_RATE = 1e-3


def replaced(name: str) -> str:
    """Returns the error message for a prepared network that was replaced."""
    return (
        f"The network {name or 'of this module'!r} was prepared for quantization and then replaced, so a "
        "float network would be trained. Lightning calls `configure_model` more than once, so it must not "
        "build a network that exists already:\n"
        "    def configure_model(self):\n"
        f"        if self.{name or 'model'} is not None:\n"
        "            return\n"
        f"        self.{name or 'model'} = build()"
    )


def announce_prepared(networks: Sequence[Prepared]) -> None:
    """Logs which networks were prepared and how, and whether int8 would overflow on this CPU."""
    for each in networks:
        rank_zero_info(f"Prepared {each}")
    warning = overflow(each.recipe for each in networks)
    if warning is not None:
        rank_zero_info(warning)


def overflow(recipes: Iterable[Recipe]) -> str | None:
    """Returns a message if int8 kernels overflow on this CPU because activations use 8 bits, else None."""
    if not any(recipe.fills_bytes for recipe in recipes) or not cpu.overflows():
        return None
    return (
        "This CPU has no VNNI, so int8 kernels overflow with 8-bit activations. Here PyTorch's int8 network "
        "runs on slower kernels that do not overflow, ONNX Runtime needs session.x64quantprecision=1, and "
        "OpenVINO has no such option. For CPUs like this use backend='x86'"
    )


def warn_of_unreached(
    trainer: pl.Trainer, requested: Schedule, resolved: ResolvedSchedule, warned: set[str]
) -> None:
    """Warns once of each moment that lies beyond the end of the run. `warned` holds the names so far."""
    epochs = trainer_facts.epochs(trainer)
    for name in resolved.never_reached(epochs, trainer_facts.steps(trainer)):
        if name not in warned:
            warned.add(name)
            rank_zero_warn(
                f"{name}={getattr(requested, name)} lies beyond the end of this run ({epochs:g} epochs), "
                "so it will not happen."
            )


def announce(trainer: pl.Trainer, before: Phase | None, phase: Phase) -> list[str]:
    """Logs a line for each change between two phases, and returns short names of the changes."""
    began = []
    when = f"at epoch {trainer.current_epoch}, step {trainer.global_step}"
    if before is None and trainer.global_step > 0:
        when = "already, as in the checkpoint"
    if phase.fake_quant and before is not None and not before.fake_quant:
        rank_zero_info(f"Fake-quantization is on {when}")
        if trainer.current_epoch > 0:  # in epoch 0 only the calibration ends, as in every run
            began.append("fake-quantization on")
    if not phase.observe and (before is None or before.observe):
        rank_zero_info(f"Observers are frozen {when}")
        began.append("observers frozen")
    if phase.freeze_bn and (before is None or not before.freeze_bn):
        rate = trainer_facts.highest_learning_rate(trainer)
        line = f"Batch-norm statistics are frozen {when}, at a learning rate of {rate:.2g}"
        if rate > _HIGH_LEARNING_RATE:
            line += ". With frozen statistics, such a high rate costs accuracy"
        rank_zero_info(line)
        began.append("batch-norm frozen")
    return began
