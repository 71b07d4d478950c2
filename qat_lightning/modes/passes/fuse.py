"""Makes one layer of each convolution or linear layer and of the batch-norm and the ReLU after it.

Two operations are fused if nothing else reads the tensor between them. A module that is called several times
is fused with what follows all of its calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx, nn

from qat_lightning.modes.graph.nodes import called_modules, module_of, sole_reader
from qat_lightning.modes.layers import fused_conv_bn, trained_layer, transposed
from qat_lightning.modes.layers.lacks_int8 import lacks_int8
from qat_lightning.modes.passes.declare import declared_rule
from qat_lightning.modes.passes.qconfigs import QConfigs, relu_after
from qat_lightning.modes.targets.rules import Target
from qat_lightning.modes.trace.fixed_norms import FixedNorm

_LAYERS: dict[type[nn.Module], tuple[Any, Any, tuple[type[nn.Module], ...]]] = {
    nn.Conv1d: (trained_layer.Conv1d, fused_conv_bn.ConvBn1d, (nn.BatchNorm1d,)),
    nn.Conv2d: (trained_layer.Conv2d, fused_conv_bn.ConvBn2d, (nn.BatchNorm2d, FixedNorm)),
    nn.Conv3d: (trained_layer.Conv3d, fused_conv_bn.ConvBn3d, (nn.BatchNorm3d,)),
    nn.Linear: (trained_layer.Linear, fused_conv_bn.LinearBn1d, (nn.BatchNorm1d,)),
    nn.ConvTranspose1d: (transposed.ConvTranspose1d, transposed.ConvTransposeBn1d, (nn.BatchNorm1d,)),
    nn.ConvTranspose2d: (
        transposed.ConvTranspose2d,
        transposed.ConvTransposeBn2d,
        (nn.BatchNorm2d, FixedNorm),
    ),
    nn.ConvTranspose3d: (transposed.ConvTranspose3d, transposed.ConvTransposeBn3d, (nn.BatchNorm3d,)),
}
"""By float class: the prepared layer, the one with a batch-norm, and the batch-norms that fit."""


class _Chain(NamedTuple):
    """What follows one call of a layer, as far as it can be fused."""

    norm: fx.Node | None = None
    relu: fx.Node | None = None


def fuse(graph_module: fx.GraphModule, qconfigs: QConfigs, target: Target) -> None:
    """Replaces each layer of a graph by its prepared form, in place. Layers that stay float do not change.

    Args:
        graph_module: A traced network.
        qconfigs: The QConfig of each node.
        target: Layers that are not in its table stay float.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for name, layer in called_modules(graph_module).items():
        nodes, qconfig = calls[name], qconfigs.of(calls[name][0])
        if type(layer) in _LAYERS and type(layer) in target.rules and qconfig is not None:
            chains = _common([_chain(graph_module, node, calls, qconfigs) for node in nodes])
            _replace(graph_module, layer, nodes, chains, qconfig.weight())
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _chain(
    graph_module: fx.GraphModule, node: fx.Node, calls: dict[str, list[fx.Node]], qconfigs: QConfigs
) -> _Chain:
    """Returns what may be fused with one call of a layer."""
    reader = sole_reader(node)
    is_norm = reader is not None and _is_norm_of(graph_module, node, reader, calls, qconfigs)
    norm = reader if is_norm else None
    return _Chain(norm, relu_after(graph_module, norm or node, qconfigs))


def _is_norm_of(
    graph_module: fx.GraphModule,
    layer: fx.Node,
    node: fx.Node,
    calls: dict[str, list[fx.Node]],
    qconfigs: QConfigs,
) -> bool:
    """Whether a node calls a batch-norm that fits the layer, and that only follows this layer."""
    norm = module_of(graph_module, node)
    fits = type(norm) in _LAYERS[type(module_of(graph_module, layer))][2] and not lacks_int8(norm)
    if not fits or qconfigs.of(node) is None or declared_rule(node) is not None:
        return False
    return {str(call.all_input_nodes[0].target) for call in calls[str(node.target)]} == {str(layer.target)}


def _by_position(call: fx.Node) -> tuple[Any, ...]:
    """Returns the arguments of a layer's call; those of a transposed convolution may have a size."""
    return (*call.args, *[call.kwargs[name] for name in ("input", "output_size") if name in call.kwargs])


def _common(chains: list[_Chain]) -> list[_Chain]:
    """Returns the part of the chains that all calls of a layer have in common."""
    norms = {None if chain.norm is None else str(chain.norm.target) for chain in chains}
    if len(norms) > 1:
        return [_Chain()] * len(chains)
    has_relu = all(chain.relu is not None for chain in chains)
    return chains if has_relu else [chain._replace(relu=None) for chain in chains]


def _replace(
    graph_module: fx.GraphModule, layer: Any, nodes: list[fx.Node], chains: list[_Chain], weight: Any
) -> None:
    plain, with_norm, _ = _LAYERS[type(layer)]
    norm, relu = chains[0].norm, chains[0].relu is not None
    if norm is None:
        made = plain.of(layer, weight, relu=relu)
    else:
        made = with_norm.of(layer, weight, relu=relu, bn=module_of(graph_module, norm))
    graph_module.set_submodule(str(nodes[0].target), made)
    for node in nodes:
        node.args, node.kwargs = _by_position(node), {}
    for chain, node in zip(chains, nodes, strict=True):
        for fused in filter(None, chain):
            fused.replace_all_uses_with(node)
            graph_module.graph.erase_node(fused)
    if norm is not None:  # it is a part of the layer now
        graph_module.delete_submodule(str(norm.target))
