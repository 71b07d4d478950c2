"""Facts about this machine's CPU that matter for int8."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

import torch

# Spelled as in Linux's /proc/cpuinfo, from the least to the most powerful: first x86, then ARM.
FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimddp", "i8mm", "sve"),
)
_DOT_PRODUCTS = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
_CAPABILITIES = {"AVX2": ("avx2",), "AVX512": ("avx2", "avx512f")}
_CPUINFO = Path("/proc/cpuinfo")


def features() -> tuple[str, ...]:
    """Returns the `FEATURES` that this CPU has."""
    fields = info()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    if not flags:
        return _CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ())
    return tuple(name for name in FEATURES if name in flags)


def has_dot_products(found: Iterable[str]) -> bool:
    """Returns whether a CPU with these features multiplies and adds int8 in one instruction.

    Without such an instruction, int8 takes three where float takes one, so it is hardly faster.
    """
    return not _DOT_PRODUCTS.isdisjoint(found)


def overflows() -> bool:
    """Returns whether int8 kernels may overflow on this CPU if weights and activations both use 8 bits.

    On x86 without VNNI, kernels add two products in 16 bits, and 255 · 127 · 2 does not fit. This applies to
    PyTorch's fbgemm and oneDNN, to ONNX Runtime by default, and to OpenVINO.
    """
    return platform.machine().lower() in ("x86_64", "amd64") and not has_dot_products(features())


def info() -> dict[str, str]:
    """Returns the fields of the first CPU in Linux's /proc/cpuinfo. Empty on other systems."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
