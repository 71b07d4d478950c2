"""Creates, checks and shares the teachers: frozen float networks that the trained networks learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import distributed, nn

from qat_lightning.base.errors import nearest
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.floating import check_not_quantized
from qat_lightning.quantize.recipe import recipe_of
from qat_lightning.run.distributed.processes import several_processes

SELF = "self"

Teacher = str | nn.Module
TeacherLike = Teacher | Mapping[str, Teacher] | None


def copied(teacher: TeacherLike) -> TeacherLike:
    """Returns `teacher` with frozen copies of its modules, so that later changes to them have no effect.

    Raises:
        ValueError: `teacher` is a string other than `"self"`, an empty mapping, or a quantized network.
        TypeError: `teacher` is of the wrong type.
    """
    if isinstance(teacher, Mapping):
        if not teacher:
            raise ValueError('teacher must name at least one network, as in {"model": "self"}, or be None.')
        return {name: _copied(each) for name, each in teacher.items()}
    return None if teacher is None else _copied(teacher)


def _copied(teacher: Teacher) -> Teacher:
    if isinstance(teacher, nn.Module):
        check_not_quantized(teacher)
        return frozen_copy(teacher)
    if not isinstance(teacher, str):
        raise TypeError(
            'teacher must be "self", a float network, a mapping of network names to these, or None, but '
            f"received {teacher!r}."
        )
    if teacher != SELF:
        raise ValueError(f'teacher must be "self" or a network itself, but received {teacher!r}.')
    return teacher


def frozen_copy(network: nn.Module) -> nn.Module:
    """Returns a copy of `network` in eval mode, without gradients."""
    copy = copy_of(network).eval().requires_grad_(False)
    copy.zero_grad()  # gradients that the original has accumulated are copied, too
    return copy


def by_name(teacher: TeacherLike, names: Iterable[str]) -> dict[str, Teacher]:
    """Returns the teacher of each network in `names` that has one.

    Raises:
        ValueError: One module is the teacher of several networks, or a mapping names an unknown network.
    """
    known = list(names)
    if teacher is None:
        return {}
    if not isinstance(teacher, Mapping):
        if isinstance(teacher, nn.Module) and len(known) > 1:
            raise ValueError(
                f"One teacher teaches one network, but {len(known)} are prepared: {', '.join(known)}. Name "
                f"the network that learns from it: Distillation(teacher={{{known[0]!r}: network}})."
            )
        return dict.fromkeys(known, teacher)
    for name in teacher:
        if name not in known:
            raise ValueError(
                f"teacher names {name!r}, but no network to prepare has that name. {nearest(name, known)}"
            )
    return dict(teacher)


def take(
    teacher: TeacherLike, module: nn.Module, names: Iterable[str], earlier: Mapping[nn.Module, nn.Module]
) -> dict[str, nn.Module]:
    """Returns the teachers of the networks `names`, which are about to be prepared.

    Args:
        teacher: As :func:`copied` returns it.
        module: The module that holds the networks.
        names: Names of the networks.
        earlier: The teachers of networks that an earlier fit has prepared.

    Raises:
        ValueError: The teacher of a network is `"self"`, but the network is prepared already.
    """
    found = {}
    for name, each in by_name(teacher, names).items():
        network = module.get_submodule(name)
        if isinstance(each, nn.Module):
            found[name] = each
        elif network in earlier:
            found[name] = earlier[network]
        elif recipe_of(network) is None:
            found[name] = frozen_copy(network)
        else:
            raise ValueError(
                f'teacher="self" is the float network before it is prepared, but {name!r} is prepared '
                "already. Start from the float network, or pass it: Distillation(teacher=network)."
            )
    return found


def share(teachers: Iterable[nn.Module]) -> bool:
    """Broadcasts the teachers of rank 0 to all ranks, as DistributedDataParallel does with weights.

    Returns:
        Whether there are several processes.
    """
    if not several_processes():
        return False
    for teacher in teachers:
        for tensor in teacher.state_dict().values():
            if isinstance(tensor, torch.Tensor):
                whole = tensor.contiguous()
                distributed.broadcast(whole, 0)
                tensor.copy_(whole)
    return True


def fingerprint(teachers: Mapping[str, nn.Module]) -> str:
    """Returns a hash of the teachers' weights and statistics."""
    digest = hashlib.sha256()
    for name, teacher in sorted(teachers.items()):
        for key, tensor in teacher.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(
                    tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
                )
    return digest.hexdigest()
