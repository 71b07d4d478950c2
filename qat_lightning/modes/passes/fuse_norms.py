"""Joins each batch-norm that no layer is before with the ReLU after it, as the backend computes them.

A batch-norm after a layer that stays float stays float, too: rounding between them would only lose accuracy.
"""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from qat_lightning.base.torch_internals import ConvTranspose
from qat_lightning.modes.graph.nodes import module_of
from qat_lightning.modes.graph.quantizable import QUANTIZABLE
from qat_lightning.modes.layers.fused_conv_bn import commutes
from qat_lightning.modes.layers.lacks_int8 import lacks_int8
from qat_lightning.modes.layers.norm_layer import NormLayer2d
from qat_lightning.modes.layers.norm_relu import NormReLU
from qat_lightning.modes.layers.trained_layer import TrainedLayer
from qat_lightning.modes.passes.declare import declared_rule
from qat_lightning.modes.passes.qconfigs import QConfigs, relu_after


def fuse_norms(graph_module: fx.GraphModule, qconfigs: QConfigs, *, as_layers: bool) -> None:
    """Fuses such batch-norms of a graph, in place.

    Args:
        graph_module: A graph whose layers are fused.
        qconfigs: The QConfig of each node.
        as_layers: Whether the backend computes a batch-norm of images as a convolution.
    """
    calls = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    counts = Counter(str(node.target) for node in calls)
    for node in calls:
        name, norm, qconfig = str(node.target), module_of(graph_module, node), qconfigs.of(node)
        is_norm = type(norm) in _NORMS and not lacks_int8(norm) and counts[name] == 1
        is_norm = is_norm and declared_rule(node) is None
        if not is_norm or qconfig is None or follows_float_layer(graph_module, node):
            continue
        relu = relu_after(graph_module, node, qconfigs)
        weight = qconfig.weight()
        if as_layers and type(norm) is nn.BatchNorm2d and commutes(weight):
            graph_module.set_submodule(name, NormLayer2d.of_norm(norm, weight, relu=relu is not None))
        elif relu is not None:
            joined = NormReLU(norm, nn.ReLU())
            joined.training = norm.training
            graph_module.set_submodule(name, joined)
        if relu is not None:
            relu.replace_all_uses_with(node)
            graph_module.graph.erase_node(relu)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def follows_float_layer(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node reads the result of a layer that stays float.

    A transposed convolution does not count: files of version 0.1.0 have qparams between the two.
    """
    layer = module_of(graph_module, node.all_input_nodes[0])
    floating = isinstance(layer, QUANTIZABLE) and not isinstance(layer, TrainedLayer)
    return floating and not isinstance(layer, ConvTranspose)
