"""The private names of torch, each behind a named function or constant.

A new version of torch may change any of them; `tests/test_internals.py` then names the broken one. Private
methods that torch expects a subclass to override (`_conv_forward`, `_load_from_state_dict`,
`_check_input_dim`) are overridden in the subclass itself, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd
from torch.utils import _python_dispatch, _pytree, checkpoint

# The common base classes of torch.nn's layers of one kind.
BatchNorm = _BatchNorm
Convolution, ConvTranspose = _ConvNd, _ConvTransposeNd
TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
"""The transposed convolutions, by their number of dimensions."""
Dropout = _DropoutNd
AvgPool, AdaptiveAvgPool = _AvgPoolNd, _AdaptiveAvgPoolNd

# What `scaled_dot_product_attention` calls on the CPU.
attention_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Nested values: tuples, lists and dicts of tensors.
MappingKey = _pytree.MappingKey
tree_flatten_with_path = _pytree.tree_flatten_with_path
tree_leaves = _pytree.tree_leaves
tree_map = _pytree.tree_map
tree_map_only = _pytree.tree_map_only
tree_structure = _pytree.tree_structure
tree_unflatten = _pytree.tree_unflatten
treespec_dumps, treespec_loads = _pytree.treespec_dumps, _pytree.treespec_loads


def register_mapping(
    kind: type[Any],
    name: str,
    context_of: Callable[[Any], Any],
    build: Callable[[Iterable[Any], Any], Any],
) -> None:
    """Registers a class of dicts as nested values.

    Args:
        kind: The class.
        name: Its name in a serialized structure.
        context_of: Returns what the structure holds besides the values, as plain values.
        build: Makes one of values and of what `context_of` returned.
    """
    _pytree.register_pytree_node(
        kind,
        lambda mapping: ([*mapping.values()], context_of(mapping)),
        build,
        serialized_type_name=name,
        flatten_with_keys_fn=lambda mapping: (
            [(MappingKey(key), value) for key, value in mapping.items()],
            context_of(mapping),
        ),
    )


_DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"


# The dicts in which a module keeps its children and tensors. `setattr` is no substitute: it checks names, and
# moves them between these dicts.


def modules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns the dict in which `module` keeps its children by name."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the dict in which `module` keeps its own parameters by name."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Returns the dict in which `module` keeps its own buffers by name."""
    return module._buffers


def own_registries(module: nn.Module) -> dict[str, Any]:
    """Returns the dicts and sets in which `module` keeps its children, its tensors and its hooks, by name."""
    names = vars(nn.Module())
    return {name: own for name, own in vars(module).items() if name in names and isinstance(own, dict | set)}


def is_persistent(module: nn.Module, name: str) -> bool:
    """Returns whether the state dict of `module` contains its buffer `name`."""
    return name not in module._non_persistent_buffers_set


def is_view(tensor: torch.Tensor) -> bool:
    """Returns whether autograd knows `tensor` as a view, of a tensor that a write would change, too."""
    return tensor._is_view()


# Hooks.


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Returns the dict in which `module` keeps its forward hooks."""
    return module._forward_hooks


def all_forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Returns the hooks that run before or after the forward of `module`."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def saves_with(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """Returns whether `hook` is a state-dict hook of `module`."""
    return hook in module._state_dict_hooks.values()


def load_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Returns the functions that run before a state dict is loaded into `module`."""
    return [getattr(each, "hook", each) for each in module._load_state_dict_pre_hooks.values()]


# Compilation, distribution, state dicts.


def is_compiled(module: nn.Module) -> bool:
    """Returns whether `module.compile()` was called, or `module` is the result of `torch.compile`."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Makes DistributedDataParallel leave the parameters and buffers `names` of `module` alone."""
    setattr(module, _DDP_IGNORED, sorted({*names, *getattr(module, _DDP_IGNORED, ())}))


def module_versions(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the versions of the modules in a state dict, by module name."""
    return getattr(state_dict, "_metadata", {})


def set_module_versions(state_dict: Any, versions: dict[str, Any]) -> None:
    """Sets the versions that :func:`module_versions` returns."""
    state_dict._metadata = versions


# Graphs.

ASSERT = torch._assert
"""The assertion that a graph can contain."""


def is_traced_constant(name: str) -> bool:
    """Returns whether torch.fx gave an attribute its name, for a tensor that a forward creates."""
    return name.startswith("_tensor_constant")


def checkpoint_generators() -> list[str]:
    """Returns the names of the functions by which `checkpoint(use_reentrant=False)` runs what it is given."""
    names = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
    return [name for name in names if hasattr(checkpoint, name)]


def switches_autocast_on(context: torch.autocast) -> bool:
    """Returns whether entering `context` switches autocast on, and not off."""
    return bool(context._enabled)


def preserved_attributes(graph_module: fx.GraphModule) -> dict[str, Any]:
    """Returns the dict of attributes that survive a deep copy of a graph module."""
    kept: dict[str, Any] = graph_module.meta.setdefault(_USER_PRESERVED_ATTRIBUTES_KEY, {})
    return kept


# Operators.

DispatchMode = _python_dispatch.TorchDispatchMode
"""A mode of one thread, which sees each operator before it runs."""


def written(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns the tensors that a call of `operator` writes to."""
    arguments = operator._schema.arguments
    values = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | {**kwargs}
    names = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    leaves = [leaf for name in names for leaf in tree_leaves(values.get(name))]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def number_of(generator: torch.Generator) -> int:
    """Returns a number that only `generator` has: operators get it as another Python object."""
    number: int = generator._cdata  # type: ignore[attr-defined]
    return number


def memory_of(tensor: torch.Tensor) -> int | None:
    """Returns a number that tensors share if they share memory; None if `tensor` has no memory of its own."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a sparse tensor, or one that wraps another
        return None


# Tensors and TorchScript.


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor that `tensor` is a view of, or `tensor` itself."""
    return tensor if tensor._base is None else tensor._base


def version_of(tensor: torch.Tensor) -> int:
    """Returns how often `tensor`, or memory that it shares, was written to in place."""
    return tensor._version


def is_script_method(function: Any) -> bool:
    """Returns whether `function` is a method of a TorchScript module."""
    return isinstance(function, torch._C.ScriptMethod)


def script_module_of(root: nn.Module, method: Any) -> str:
    """Returns the name of the TorchScript module in `root` that `method` belongs to."""
    scripts = {n: m for n, m in root.named_modules() if isinstance(m, torch.jit.ScriptModule)}
    return next(name for name, module in scripts.items() if module._c == method.owner)


# Parts of a forward.


def quantized_tensor(integers: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """Returns the int8 tensor that holds these integers."""
    return torch._make_per_tensor_quantized_tensor(integers, scale, zero_point)


def convolve(
    layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_size: Any = None
) -> torch.Tensor:
    """Computes a convolution layer of torch.nn, transposed or not, with another weight and bias.

    Args:
        layer: The layer.
        x: Its input.
        weight: The weight.
        bias: The bias, or None.
        output_size: What a transposed convolution may be called with, besides the input.
    """
    if not isinstance(layer, ConvTranspose):
        return layer._conv_forward(x, weight, bias)
    settings = (
        layer.stride,
        layer.padding,
        output_padding(layer, x, output_size),
        layer.groups,
        layer.dilation,
    )
    return TRANSPOSED[len(layer.kernel_size)](x, weight, bias, *settings)


def output_padding(layer: Any, x: torch.Tensor, output_size: Any) -> Sequence[int]:
    """Returns how much a transposed convolution adds to its result, so that it has a size, or its own."""
    kernel = layer.kernel_size
    arguments: Any = (x, output_size, layer.stride, layer.padding, kernel, len(kernel), layer.dilation)
    return layer._output_padding(*arguments)


def self_attention(
    layer: nn.TransformerEncoderLayer,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    *,
    is_causal: bool,
) -> torch.Tensor:
    """Computes the self-attention block of a transformer layer of torch.nn."""
    return layer._sa_block(x, mask, padding_mask, is_causal=is_causal)


def feed_forward(layer: nn.TransformerEncoderLayer, x: torch.Tensor) -> torch.Tensor:
    """Computes the feed-forward block of a transformer layer of torch.nn."""
    return layer._ff_block(x)
