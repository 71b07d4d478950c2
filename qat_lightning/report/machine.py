"""The CPU that speeds are measured on, and what it has for int8."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from qat_lightning.report.content import Machine

# As the kernel spells them, from the least to the most that they bring: x86, then ARM.
FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimddp", "i8mm", "sve"),
)
_DOT_PRODUCTS = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
_CAPABILITIES = {"AVX2": ("avx2",), "AVX512": ("avx2", "avx512f")}
_CPUINFO = Path("/proc/cpuinfo")


def describe(threads: int) -> Machine:
    """Describes this machine.

    Args:
        threads: Threads that networks are measured on.
    """
    said = _cpuinfo()
    flags = set(said.get("flags", said.get("Features", "")).split())
    features = tuple(name for name in FEATURES if name in flags)
    if not flags:
        features = _CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ())
    named = [said.get(key, "") for key in ("model name", "Hardware")]
    cpu = next(filter(None, (*named, platform.processor(), platform.machine())), "unknown")
    return Machine(cpu=cpu, features=features, cores=usable_cores(), threads=threads)


def usable_cores() -> int:
    """CPU cores that this process may run on, which may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_vnni(machine: Machine) -> bool:
    """Whether the CPU multiplies and adds int8 in one instruction, of whatever name.

    Without one, int8 takes three instructions where float takes one, and is hardly faster.
    """
    return not _DOT_PRODUCTS.isdisjoint(machine.features)


def _cpuinfo() -> dict[str, str]:
    """What Linux says of its first CPU; empty elsewhere."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
