"""`prepare`: a float network becomes one that trains for int8."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from torch import nn

from qat_lightning.base.backends import check_backend, engine
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.modes import MODES, ModeResult, Options, check_mode, check_untraceable, choose_mode
from qat_lightning.modes.layers.zero_scale import replace_zero_scales
from qat_lightning.modes.qconfig import Overrides, QConfigLike, check_qconfig, describe, qconfig_name
from qat_lightning.quantize.batch_norms import note_batch_norms
from qat_lightning.quantize.floating import check_float
from qat_lightning.quantize.recipe import Recipe, attach
from qat_lightning.quantize.selection import FloatPattern, resolve_keep_float, resolve_overrides

_VERSIONS = {name: version(name) for name in ("qat-lightning", "torch")}


def prepare(
    network: nn.Module,
    *,
    backend: str = "x86",
    qconfig: QConfigLike | None = None,
    mode: str = "auto",
    keep_float: Sequence[FloatPattern] = (),
    fuse: str | Sequence[Sequence[str]] = "auto",
    replace_relu6: bool = True,
    overrides: Overrides | None = None,
    untraceable: str = "error",
    example_inputs: tuple[Any, ...] | None = None,
) -> nn.Module:
    """Fuses a float network and inserts fake-quantization, ready for training.

    Steps 1 to 4 of PyTorch's eager and FX workflows for quantization-aware training
    (https://docs.pytorch.org/docs/stable/quantization.html).

    Args:
        network: A float network. It is used up: the result shares its parameters, and in eager mode
            is the same object.
        backend: The engine of the int8 network: `"x86"`, `"fbgemm"`, `"qnnpack"` or `"onednn"`.
        qconfig: One's own `QConfig` or `QConfigMapping` instead of the backend's default.
        mode: `"eager"`, `"fx"`, or `"auto"`: eager where the network holds QuantStubs, else fx.
        keep_float: Names, globs or types of submodules that stay float; in fx mode also functions, such as
            `torch.matmul` or, by name, `"torch.matmul()"`, of which all calls do.
        fuse: `"auto"`, or in eager mode a list of groups of module names to fuse. Auto finds them in the
            graph of the network; in eager mode its own `fuse_model` goes first, where it has one.
        replace_relu6: Whether to replace ReLU6 by ReLU, which int8 fuses into the layer before it.
        overrides: By name or glob, the `QConfig` of single convolutions and linear layers, the name of a
            backend to use its default, or None to keep them float.
        untraceable: What to do in fx mode with a part whose forward `torch.fx` cannot trace: `"error"`
            raises with its file and line, `"float"` keeps the smallest such parts float and quantizes
            the rest; the recipe's `untraceable` lists them.
        example_inputs: What `forward` takes, as a tuple. Eager mode needs it where the network cannot be
            traced: to find the fusions, a copy of the network runs on it.

    Returns:
        The prepared network, in the mode (training or eval) that `network` was in.

    Raises:
        ValueError: The network is quantized already, holds nothing to quantize, cannot be traced
            (fx) or lacks stubs or fusions (eager); a name, backend or mode is unknown.
        TypeError: An argument is of the wrong type.
    """
    check_backend(backend)
    check_qconfig(qconfig)
    check_mode(mode)
    _check_example_inputs(example_inputs)
    check_untraceable(untraceable)
    check_float(network)
    chosen, _ = choose_mode(network, mode)
    resolved = resolve_overrides(network, overrides or {})
    floating = [name for name, value in resolved.items() if value is None]
    kept = resolve_keep_float(
        network, [*keep_float, *floating], lambda n: MODES[chosen].functions(n, untraceable)
    )
    qconfigs = {name: value for name, value in resolved.items() if value is not None}
    options = Options(backend, qconfig, kept, fuse, replace_relu6, qconfigs, untraceable, example_inputs)
    with quiet_torch_ao(), engine(backend):
        options = MODES[chosen].check(network, options)
        made = MODES[chosen].prepare(network, options)
        prepared = made.network
        replace_zero_scales(prepared)
        recipe = _recipe(made, chosen, options)
    attach(prepared, recipe)
    note_batch_norms(prepared)
    return prepared


def _check_example_inputs(example_inputs: object) -> None:
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise TypeError(
            "example_inputs must be a tuple of what forward takes, as in example_inputs=(batch,), but "
            f"received {type(example_inputs).__name__}."
        )


def _recipe(made: ModeResult, mode: str, options: Options) -> Recipe:
    grid = {name: describe(child) for name, child in fake_quantizes(made.network)}
    suffix = ".weight_fake_quant"
    layers = tuple(name.removesuffix(suffix) for name in grid if name.endswith(suffix))
    if not layers:
        raise ValueError(
            f"Nothing is left to quantize: keep_float={options.keep_float}, the qconfig and what cannot be "
            f"traced ({', '.join(made.untraceable) or 'nothing'}) keep every layer float. Keep fewer."
        )
    fuse = options.fuse
    return Recipe(
        backend=options.backend,
        mode=mode,
        qconfig=qconfig_name(options.qconfig),
        keep_float=options.keep_float,
        fuse=fuse if isinstance(fuse, str) else tuple(tuple(group) for group in fuse),
        replace_relu6=options.replace_relu6,
        overrides={name: qconfig_name(value) for name, value in options.overrides.items()},
        untraceable=made.untraceable,
        relu6=made.relu6,
        layers=layers,
        grid=grid,
        versions=_VERSIONS,
    )
