"""`prepare` and `convert`: quantization-aware training without Lightning, and what the callback calls."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, TypeVar

from torch import nn

from qat_lightning.backends import check_backend, engine, run_on_engine
from qat_lightning.batch_norms import make_local, note_batch_norms, restore_batch_norms
from qat_lightning.errors import ConversionError
from qat_lightning.fake_quantize import fake_quantizes
from qat_lightning.finiteness import first_nonfinite_weight
from qat_lightning.modes import MODES, Made, Options, check_mode, check_untraceable, choose_mode
from qat_lightning.modes.kernels import pack_weights
from qat_lightning.modes.qconfig import Overrides, QConfigLike, check_qconfig, describe, qconfig_name
from qat_lightning.modes.tracing import holds_quantizable
from qat_lightning.modes.trained import use_theirs
from qat_lightning.modes.zero_scale import replace_zero_scales
from qat_lightning.phases import evaluate
from qat_lightning.quiet import quiet_torch_ao
from qat_lightning.ranges import check_observed
from qat_lightning.recipe import Recipe, attach, quantized_networks, recipe_of
from qat_lightning.selection import FloatPattern, resolve_keep_float, resolve_overrides

ModuleT = TypeVar("ModuleT", bound=nn.Module)

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


def convert(module: ModuleT) -> ModuleT:
    """Converts the prepared network, or every prepared network inside a module, to int8.

    Step 6 of PyTorch's workflow. The given module is not changed: a copy is converted, on the CPU
    and in eval mode, and each int8 network in it runs on the engine of its recipe.

    Args:
        module: A network that :func:`prepare` made, or a module (a LightningModule) that holds
            some.

    Returns:
        The copy with int8 networks.

    Raises:
        ConversionError: There is nothing prepared in it, or no data has passed through it in
            training.
    """
    prepared = [net for _, net, recipe in quantized_networks(module) if not recipe.int8]
    if not prepared:
        raise ConversionError(
            f"convert takes a network that `prepare` made, or a module that holds one, but received "
            f"{type(module).__name__}, which holds none."
        )
    for network in prepared:
        check_observed(network)
        weight = first_nonfinite_weight(network)
        if weight is not None:
            raise ConversionError(f"{weight!r} holds a NaN or an infinity, which int8 has no number for.")
    return convert_in_place(copy_of(module))


def copy_of(module: ModuleT) -> ModuleT:
    """A deep copy that also works as a LightningModule of its own; not compiled, where `module` is."""
    copied = copy.deepcopy(module)
    if hasattr(copied, "_metric_attributes"):
        # Lightning's memory of its metrics, by the ids of the original's.
        vars(copied)["_metric_attributes"] = None
    for name in vars(copied).get("_compiler_ctx") or ():
        # Lightning's compiled methods, which would run the original.
        vars(copied).pop(name.removeprefix("original_"), None)
        vars(copied)["_compiler_ctx"] = None
    return copied


def convert_in_place(module: ModuleT) -> ModuleT:
    """:func:`convert` without the copy and the checks, for a module that nobody else holds."""
    module = module.cpu().eval()
    make_local(module)
    use_theirs(module)
    evaluate(module)
    for name, network, recipe in list(quantized_networks(module)):
        if recipe.int8:
            continue
        restore_batch_norms(network)
        with quiet_torch_ao(), engine(recipe.backend):
            converted = MODES[recipe.mode].convert(network)
        pack_weights(converted, recipe.backend)
        attach(converted, dataclasses.replace(recipe, int8=True))
        run_on_engine(converted, recipe.backend)
        module = replace_submodule(module, name, converted.eval())
    return module


def replace_submodule(module: ModuleT, name: str, new: nn.Module) -> ModuleT:
    """Puts `new` in the place of the submodule `name`, and wherever else the same one is registered.

    Returns:
        `module`, or `new` where the name is empty.
    """
    if not name:
        return new  # type: ignore[return-value]
    old = module.get_submodule(name)
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if child is old:
                setattr(parent, key, new)
    return module


def check_float(network: nn.Module) -> None:
    """Raises a `ValueError` if `network` is quantized already or holds nothing to quantize."""
    check_not_quantized(network)
    if is_compiled(network):
        raise ValueError(
            "The network is compiled (torch.compile), and a compiled one cannot be changed. Prepare the "
            "plain network and compile the result: pass trainer.fit(torch.compile(module)), or compile in "
            "the LightningModule's `on_fit_start`, as in self.model.compile()."
        )
    if not holds_quantizable(network):
        kind = type(network).__name__
        raise ValueError(f"{kind} holds no convolution and no linear layer, so there is nothing to quantize.")


def is_compiled(module: nn.Module) -> bool:
    """Whether `module`, or a part of it, is compiled: by `torch.compile` or by its own `compile`."""
    return any(
        child._compiled_call_impl is not None or type(child).__name__ == "OptimizedModule"
        for child in module.modules()
    )


def check_not_quantized(network: nn.Module) -> None:
    """Raises a `ValueError` if `network` is prepared or int8, by this package or by torch.ao."""
    kind = type(network).__name__
    if recipe_of(network) is not None:
        raise ValueError(f"{kind} is quantized already: it was prepared before. Pass a float network.")
    for name, module in network.named_modules():
        if next(fake_quantizes(module), None) is not None and not name:
            raise ValueError(
                f"{kind} is quantized already: it holds fake-quantize modules, so torch.ao or an "
                "earlier call has prepared it. Pass the float network."
            )
        if is_int8(module):
            raise ValueError(
                f"{kind} is quantized already: its {name or kind!r} is the int8 module "
                f"{type(module).__module__}.{type(module).__name__}. Pass the float network; "
                "torchvision's quantizable models take quantize=False."
            )


def _check_example_inputs(example_inputs: object) -> None:
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise TypeError(
            "example_inputs must be a tuple of what forward takes, as in example_inputs=(batch,), but "
            f"received {type(example_inputs).__name__}."
        )


def is_int8(module: nn.Module) -> bool:
    """Whether `module` is an int8 layer of torch.ao."""
    package = type(module).__module__
    return package.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")) and not type(
        module
    ).__name__.endswith("FloatFunctional")


def _recipe(made: Made, mode: str, options: Options) -> Recipe:
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
