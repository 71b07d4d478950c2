"""Answers questions about a Trainer: whether it is supported, how long its run is, how far it has come."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from qat_lightning.base import lightning_internals
from qat_lightning.quantize.floating import is_compiled as holds_compiled

_SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def check_strategy(trainer: pl.Trainer) -> None:
    """Raises a `MisconfigurationException` if the strategy or the precision is not supported."""
    if isinstance(trainer.strategy, _SHARDED):
        raise MisconfigurationException(
            "Quantization-aware training needs every parameter whole on every rank, but "
            f"{type(trainer.strategy).__name__} shards them. Use strategy='ddp', or a single device."
        )
    if str(trainer.precision).endswith("-true") and trainer.precision != "32-true":
        raise MisconfigurationException(
            "Ranges and int8 conversion need float32 weights, but precision is "
            f"{trainer.precision!r}. Use '32-true', 'bf16-mixed' or '16-mixed'."
        )
    synchronizes = lightning_internals.synchronizes_batch_norm(trainer)
    if synchronizes and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise MisconfigurationException(
            "sync_batchnorm=True needs GPUs: PyTorch's SyncBatchNorm does not accept CPU tensors in "
            "training. On the CPU, leave it out."
        )
    start_method = lightning_internals.start_method(trainer)
    if start_method is not None:
        raise MisconfigurationException(
            f"The strategy starts its processes by {start_method!r}, and then loads the weights into the "
            "parent process, where the module is not prepared. Use strategy='ddp', which starts processes as "
            "scripts. In a notebook, use a single device."
        )


def configure_model(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Calls the module's `configure_model`, if it has one, in the same contexts as Lightning."""
    if is_overridden("configure_model", module):
        lightning_internals.configure_model(trainer)


def epochs(trainer: pl.Trainer) -> float:
    """Returns the number of epochs of the whole run; infinite without a limit."""
    return math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)


def steps(trainer: pl.Trainer) -> float:
    """Returns the number of steps of the whole run, counted as in :func:`steps_done`; may be infinite."""
    if _counts_batches(trainer):
        return trainer.num_training_batches * epochs(trainer)
    limit = math.inf if trainer.max_steps == -1 else trainer.max_steps
    return min(limit, _accumulated_steps(trainer) or trainer.estimated_stepping_batches)


def steps_done(trainer: pl.Trainer) -> int:
    """Returns the number of steps done so far: optimizer steps, or batches under manual optimization.

    Under manual optimization, a batch may step several optimizers or none, and Lightning's global step counts
    each of these steps. So the length of the run is known only in batches.
    """
    if _counts_batches(trainer):
        return max(trainer.fit_loop.total_batch_idx, 0)
    return trainer.global_step


def _accumulated_steps(trainer: pl.Trainer) -> int | None:
    """Returns the number of steps if gradient accumulation changes by epoch, which Lightning cannot count."""
    found = [c for c in callbacks(trainer) if isinstance(c, GradientAccumulationScheduler)]
    if not found or not math.isfinite(trainer.num_training_batches * epochs(trainer)):
        return None
    factors = [found[0].get_accumulate_grad_batches(epoch) for epoch in range(int(epochs(trainer)))]
    return sum(math.ceil(trainer.num_training_batches / factor) for factor in factors)


def _counts_batches(trainer: pl.Trainer) -> bool:
    return not trainer.lightning_module.automatic_optimization and math.isfinite(epochs(trainer))


def callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """Returns all callbacks of the run, in the order in which Lightning calls them."""
    return list(vars(trainer)["callbacks"])


def is_fast_dev_run(trainer: pl.Trainer) -> bool:
    """Returns whether this is a `fast_dev_run`, which writes no files."""
    return bool(vars(trainer).get("fast_dev_run"))


def is_compiled(module: pl.LightningModule) -> bool:
    """Returns whether `module` or a network in it is compiled."""
    return lightning_internals.is_compiled(module) or holds_compiled(module)


def checkpoint_folder(trainer: pl.Trainer) -> Path:
    """Returns the folder of the run's checkpoints, or `default_root_dir` if there is none."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder or trainer.default_root_dir)


def validation_data(trainer: pl.Trainer) -> Any:
    """Returns the user's validation loaders over all data, not only this rank's share, or None."""
    source = lightning_internals.validation_source(trainer)
    return source.dataloader() if source.is_defined() else None


def highest_learning_rate(trainer: pl.Trainer) -> float:
    """Returns the highest current learning rate among all parameter groups."""
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return float(max(rates, default=0.0))
