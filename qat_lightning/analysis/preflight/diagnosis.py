"""Explains why a dry run failed: turns PyTorch's error into one that names the line and the fix."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from qat_lightning.analysis.preflight.call_location import CallLocation, line_of_error
from qat_lightning.base.errors import PreflightError

_NO_KERNEL = re.compile(r"Could not run '([\w:.]+)' with arguments from the '(\w+)' backend")
_NO_INT8 = re.compile(r"not implemented for 'QU?Int\d+'|not supported on quantized tensors")
_CAT = "All inputs of this cat operator must share"
_MIXED = re.compile(r"promoteTypes with quantized|requires quantized dtype|[Ee]xpected .*quantized")
_ENGINE = re.compile(r"[Dd]idn't find engine|[Ee]ngine .* not supported|for quantized engine")
# An int8 operation calls these on its inputs. With the CPU backend they fail if an input is float.
_READS_QPARAMS = ("aten::qscheme", "aten::q_scale", "aten::q_zero_point")
_FX = "mode='fx' places quantization by itself."
_FLOAT_FUNCTIONAL = ("add", "mul", "cat", "matmul")


class _Explanation(NamedTuple):
    """The operation that fails, the reason, and the fix."""

    op: str
    why: str
    fix: str


def explain(
    error: Exception, network: nn.Module, name: str, stage: str, here: CallLocation
) -> PreflightError:
    """Turns an error of a dry run into one that names the place and the fix.

    Args:
        error: The error that PyTorch raised.
        network: The copy that ran.
        name: Name of the network in the LightningModule.
        stage: The stage that failed: `"conversion"`, `"int8 forward"`, …
        here: The submodules that were running.
    """
    path = here.path[-1] if here.path else ""
    kind = type(network.get_submodule(path)).__name__
    explanation = _explanation(str(error), here.call, path)
    line = line_of_error(error, network)
    return PreflightError(
        f"{name or kind!r} would fail in its {stage}: {explanation.why}\n"
        f"  in {path or 'its forward'} ({kind})" + (f", at {line}" if line else "") + "\n"
        f"  PyTorch says: {_first_sentence(error)}\n"
        f"To fix it: {explanation.fix}",
        network=name,
        path=path,
        line=line,
        op=explanation.op,
    )


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". This could be because")[0] or type(error).__name__


def _explanation(message: str, call: str, path: str) -> _Explanation:
    match = _NO_KERNEL.search(message)
    if match is not None and not (match[1] in _READS_QPARAMS and match[2] == "CPU"):
        return _no_kernel(match[1], match[2], path)
    if _CAT in message or _NO_INT8.search(message):
        return _not_int8("cat" if _CAT in message else call, path)
    if _ENGINE.search(message):
        return _Explanation(
            "engine",
            "it runs on another engine than the one it was converted for.",
            "do not set torch.backends.quantized.engine in the network. Each int8 network selects its own "
            "engine.",
        )
    if match is not None or _MIXED.search(message):
        return _Explanation(
            call,
            f"an int8 tensor meets a float one, or a float type, in {call}.",
            f"quantize both with QuantStubs, or dequantize both with DeQuantStubs, before this line. {_FX}",
        )
    return _Explanation(call, f"{call or 'an operation in it'} fails.", f"{_keep_float(path)} {_FX}")


def _no_kernel(op: str, backend: str, path: str) -> _Explanation:
    if op.startswith("quantized::") and backend == "CPU":
        why = f"a float tensor reaches {op}, an int8 operation."
        return _Explanation(
            op, why, f"quantize it before that line: x = self.quant(x), with a QuantStub. {_FX}"
        )
    if not backend.endswith("CPU"):
        device = backend.removeprefix("Quantized")
        why = f"a tensor on {device} reaches {op}, and int8 networks run on the CPU."
        return _Explanation(
            op, why, "pass tensors on the CPU (x.cpu()), and move none to a device in the network."
        )
    return _not_int8(op, path)


def _not_int8(op: str, path: str) -> _Explanation:
    short = op.split("::")[-1].split(".")[0].strip("_")
    if short in _FLOAT_FUNCTIONAL:
        fix = (
            f"give the line a FloatFunctional of its own: self.{short} = FloatFunctional() in __init__, and "
            f"self.{short}.{short}(…) instead of the operator or function. {_FX}"
        )
        return _Explanation(op, f"a plain {short} of int8 tensors has no qparams for its result.", fix)
    fix = "keep it float: x = self.dequant(x) before that line and x = self.quant(x) after it"
    fix += f", or {_keep_float(path)}" if path else "."
    return _Explanation(op, f"{op} has no int8 form.", f"{fix} {_FX}")


def _keep_float(path: str) -> str:
    return f"keep_float=[{path!r}]." if path else "Keep the part float (keep_float=[…])."
