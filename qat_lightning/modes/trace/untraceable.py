"""Around what `torch.fx` cannot trace: the smallest parts that fail stay whole, and float."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qat_lightning.base.errors import UntraceableError
from qat_lightning.modes.trace.calls import Whole
from qat_lightning.modes.trace.tracing import trace_with


def trace_around(network: nn.Module) -> tuple[fx.GraphModule, dict[str, Any], dict[str, str]]:
    """Traces `network`, calling as a whole each submodule in whose own forward the trace fails.

    Returns:
        The graph module and the scopes, as `trace` returns them, and the lines at
        which the parts failed, by name.

    Raises:
        UntraceableError: The forward of `network` itself is at fault.
    """
    kept: dict[str, str] = {}
    while True:
        try:
            graph_module, scopes = trace_with(network, Whole(frozenset(kept)))
        except UntraceableError as error:
            if not error.part or error.part in kept:
                raise
            kept[error.part] = error.line
        else:
            called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
            return graph_module, scopes, {name: line for name, line in kept.items() if name in called}
