"""Turns a float network into a `torch.fx` graph that still follows `train()` and `eval()`.

A trace records one run, so that each decision that `forward` makes by `self.training` is fixed: a network
traced in training mode would apply dropout in eval mode, too. So the network is traced twice, in training and
in eval mode, and the two graphs are joined into one:

- A call with different literal arguments, such as `F.dropout(x, 0.5, True)` and `F.dropout(x, 0.5, False)`,
  becomes a small module that chooses its arguments by its own `training` flag.
- If the outputs differ (a tuple with auxiliary logits in training, a tensor in eval), the graph computes
  both, and a small module at the end returns the one of the current mode. Conversion keeps only the eval
  output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from qat_lightning.base.errors import UntraceableError
from qat_lightning.modes.graph.by_mode import OutputByMode
from qat_lightning.modes.graph.dropout import remove_dropout
from qat_lightning.modes.graph.guards import remove_guards
from qat_lightning.modes.graph.identities import erase_identities
from qat_lightning.modes.graph.mutation import redirect_later_reads
from qat_lightning.modes.graph.quantizable import holds_quantizable
from qat_lightning.modes.trace.calls import Opaque
from qat_lightning.modes.trace.functional import read_metadata_from_buffers, write_out_arguments
from qat_lightning.modes.trace.join_modes import join_modes
from qat_lightning.modes.trace.network_tracer import NetworkTracer, reads_training
from qat_lightning.modes.trace.norm_acts import split_norms
from qat_lightning.modes.trace.own_layers import call_plain_layers
from qat_lightning.modes.trace.padded_layers import split_padded_layers
from qat_lightning.modes.trace.shared_weights import call_layers_of_weights, copy_reads_of_layers
from qat_lightning.modes.trace.symbolic import is_scripted, record_symbolically
from qat_lightning.modes.trace.transformers import has_plain_forward, traceable_transformers

Record = Callable[[nn.Module, Opaque], tuple[NetworkTracer, fx.Graph, fx.Graph]]
"""Records a network's forward: returns a tracer, the graph of training mode, and that of eval mode."""


def _holds_layers(module: nn.Module) -> bool:
    return holds_quantizable(module) or any(is_scripted(child) for child in module.modules())


def trace(
    network: nn.Module, record: Record = record_symbolically, whole: Opaque | None = None
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Traces `network` into a graph that behaves like it in training and in eval mode.

    Args:
        network: A float network. Its modules and parameters are shared with the result.
        record: How to record its forward.
        whole: The submodules and functions that become a single call.

    Returns:
        The graph module, and the scope (module name and type) of each node, which torch.ao uses to
        find the qconfig of a function call.

    Raises:
        UntraceableError: `torch.fx` cannot trace it, or the two graphs cannot be joined. The message names
            the file and the line.
    """
    whole = whole or Opaque()
    try:
        return trace_with(network, whole, record)
    except UntraceableError:
        leaves = frozenset(
            name
            for name, module in network.named_modules()
            if name and reads_training(module) and not has_plain_forward(module)
        )
        if not leaves:
            raise
        return trace_with(network, whole | Opaque(leaves), record)


def trace_with(
    network: nn.Module, opaque: Opaque, record: Record = record_symbolically
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Traces like :func:`trace`, with a single call for each part in `opaque` and each untraceable part."""
    with split_norms(network):
        return _trace_split(network, opaque, record)


def _trace_split(network: nn.Module, opaque: Opaque, record: Record) -> tuple[fx.GraphModule, dict[str, Any]]:
    try:
        with traceable_transformers(network):
            tracer, graph, eval_graph = record(network, opaque)
    except UntraceableError as error:
        more = opaque.with_culprit(error.__cause__, network, _holds_layers)
        if more is None:
            raise
        return _trace_split(network, more, record)
    scopes = {**tracer.node_name_to_scope, **join_modes(network, graph, eval_graph)}
    erase_identities(network, graph)
    redirect_later_reads(network, graph)
    write_out_arguments(graph)
    plain = call_plain_layers(network, graph)
    read_metadata_from_buffers(network, graph)
    graph_module = fx.GraphModule(network, graph, type(network).__name__)
    for name, layer in plain.items():
        graph_module.set_submodule(name, layer)
    call_layers_of_weights(graph_module, scopes)
    copy_reads_of_layers(graph_module)
    split_padded_layers(graph_module, scopes)
    return graph_module, scopes


def evaluate_only(graph_module: fx.GraphModule) -> None:
    """Reduces a prepared graph to what eval mode runs, in place, for conversion and export."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and isinstance(
            graph_module.get_submodule(str(node.target)), OutputByMode
        ):
            node.replace_all_uses_with(node.args[1])
            graph_module.graph.erase_node(node)
    remove_dropout(graph_module)
    remove_guards(graph_module, of_training=True)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
