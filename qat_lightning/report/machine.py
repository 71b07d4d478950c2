"""Describes the machine that speeds are measured on."""

from __future__ import annotations

import os
import platform

from qat_lightning.base import cpu
from qat_lightning.report.content import Machine


def describe(threads: int) -> Machine:
    """Describes this machine.

    Args:
        threads: Threads that networks are measured with.
    """
    fields = cpu.info()
    names = [fields.get(key, "") for key in ("model name", "Hardware")]
    name = next(filter(None, (*names, platform.processor(), platform.machine())), "unknown")
    return Machine(cpu=name, features=cpu.features(), cores=usable_cores(), threads=threads)


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_vnni(machine: Machine) -> bool:
    """Returns whether the CPU multiplies and adds int8 in one instruction; see `qat_lightning.base.cpu`."""
    return cpu.has_dot_products(machine.features)
