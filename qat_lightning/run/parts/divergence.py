"""The divergence of a network's logits from its teacher's, and where a network's output holds its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Computes `temperature`² · KL(softmax(teacher / temperature) ‖ softmax(logits / temperature)).

    All in float32. The factor `temperature`² is from Hinton et al., https://arxiv.org/abs/1503.02531: it
    compensates for gradients that shrink with the square of the temperature.

    Args:
        logits: Batch x classes, or batch x classes x height x width.
        teacher: The teacher's logits, of the same shape.
        temperature: Above 1, less likely classes count more.

    Returns:
        The mean over the batch (and pixels), and its gradient with respect to `logits`.
    """
    ours, theirs = (F.log_softmax(each.float() / temperature, dim=1) for each in (logits, teacher))
    count = logits.numel() / logits.shape[1]
    value = F.kl_div(ours, theirs, reduction="sum", log_target=True) * (temperature**2 / count)
    return value, (ours.exp() - theirs.exp()) * (temperature / count)


def logits_of(output: Any, whose: str) -> Tensor:
    """Returns the logits in a network's output: the output itself, or its first element."""
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        first = next(iter(output), None)
    if not isinstance(first, Tensor):
        raise ValueError(
            "Distillation compares logits. A network must return them as a tensor, or as the first element "
            f"of a tuple or dict, but {whose} returns a {type(output).__name__} that does not start with one."
        )
    if first.ndim not in (2, 4) or first.shape[1] < 2 or not first.is_floating_point():
        raise ValueError(
            "Distillation compares logits of batch x classes, or of batch x classes x height x width, of at "
            f"least two classes, but {whose} returns {first.dtype} of shape {tuple(first.shape)}."
        )
    return first
