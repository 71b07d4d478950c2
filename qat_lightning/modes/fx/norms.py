"""Lets torch.ao fuse batch-norms without trained factors, and finds what has no usable int8 form.

torch.ao fuses only batch-norms with parameters. So a batch-norm with `affine=False`, or with fixed factors,
has parameters while it is fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base.subclass import other_classes
from qat_lightning.base.torch_internals import BatchNorm, buffers_of, modules_of, parameters_of
from qat_lightning.modes.graph.nodes import called_modules
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn
from qat_lightning.modes.layers.lacks_int8 import lacks_int8
from qat_lightning.modes.trace.fixed_norms import FixedNorm

_FACTORS = ("weight", "bias")


def without_int8(graph_module: fx.GraphModule) -> list[str]:
    """Returns the names of the modules that a graph calls and that :func:`lacks_int8` names."""
    return [name for name, module in called_modules(graph_module).items() if lacks_int8(module)]


@contextmanager
def hidden(prepared: fx.GraphModule) -> Iterator[None]:
    """Hides these modules while the block converts: torch.ao lowers each of a class that it knows.

    It does so without regard to the QConfig, wherever int8 layers surround the module.
    """
    kinds = {module: type(module) for module in prepared.modules() if lacks_int8(module)}
    with other_classes({module: type(kind.__name__, (kind,), {}) for module, kind in kinds.items()}):
        yield


class Factors:
    """The parameters of batch-norms that have none of their own, while torch.ao fuses a graph.

    Args:
        graph_module: A traced network. Its batch-norms get parameters.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._fixed: set[nn.Parameter | None] = set()
        self._plain: set[nn.Parameter | None] = set()
        norm: Any
        for name, norm in called_modules(graph_module).items():
            if isinstance(norm, FixedNorm):
                graph_module.set_submodule(name, plain := plain_norm(norm))
                self._fixed.add(parameters_of(plain)["weight"])
            elif _lacks_factors(norm):
                _give_factors(norm)
                self._plain.add(norm.weight)

    def take_back(self, prepared: nn.Module) -> None:
        """Makes the batch-norms of the prepared graph what they were, wherever they are now."""
        for parent, name, norm in _norms(prepared):
            weight = parameters_of(norm).get("weight")
            if weight in self._fixed:
                modules_of(parent)[name] = _fixed(norm)
            elif weight in self._plain and not _divides_by_factors(parent):
                parameters_of(norm).update(dict.fromkeys(_FACTORS))
                norm.affine = False


def use_plain_norms(prepared: fx.GraphModule) -> None:
    """Gives torch.ao's convert what it knows, in place: torch.nn's batch-norms, with factors."""
    for parent in list(prepared.modules()):
        for name, norm in list(modules_of(parent).items()):
            if isinstance(norm, FixedNorm):
                modules_of(parent)[name] = plain_norm(norm).eval()
            elif _lacks_factors(norm):
                _give_factors(norm)


def _divides_by_factors(layer: nn.Module) -> bool:
    """Whether `layer` is torch.ao's fused module, which needs the factors to train."""
    return hasattr(layer, "freeze_bn_stats") and not isinstance(layer, FusedConvBn)


def _lacks_factors(norm: Any) -> bool:
    return isinstance(norm, BatchNorm) and not norm.affine and norm.running_mean is not None


def _give_factors(norm: Any) -> None:
    one = torch.ones_like(norm.running_mean)
    for name, value in zip(_FACTORS, (one, torch.zeros_like(one)), strict=True):
        parameters_of(norm)[name] = nn.Parameter(value, requires_grad=False)
    norm.affine = True


def _norms(network: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in list(network.modules()):
        for name, child in list(modules_of(parent).items()):
            if isinstance(child, BatchNorm):
                yield parent, name, child


def plain_norm(norm: FixedNorm) -> nn.Module:
    """Returns torch.nn's batch-norm with the state of `norm`, in its mode."""
    plain = nn.BatchNorm2d(norm.weight.numel(), norm.eps, affine=False, device="meta")
    plain.affine = True
    buffers_of(plain).update(
        running_mean=norm.running_mean, running_var=norm.running_var,
        num_batches_tracked=torch.zeros((), dtype=torch.long, device=norm.weight.device),
    )  # fmt: skip
    for name in _FACTORS:
        parameters_of(plain)[name] = nn.Parameter(getattr(norm, name), requires_grad=False)
    return plain.train(norm.training)


def _fixed(norm: Any) -> FixedNorm:
    fixed = FixedNorm()
    fixed.eps = norm.eps
    for name in ("running_mean", "running_var"):
        fixed.register_buffer(name, getattr(norm, name))
    for name in _FACTORS:
        fixed.register_buffer(name, getattr(norm, name).detach())
    return fixed.train(norm.training)
