"""Traces a network around the smallest parts that `torch.fx` cannot trace, which stay float."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qat_lightning.base.errors import UntraceableError
from qat_lightning.modes.graph.nodes import called_modules
from qat_lightning.modes.trace.calls import Opaque
from qat_lightning.modes.trace.symbolic import record_symbolically
from qat_lightning.modes.trace.tracing import Record, trace_with


def trace_around(
    network: nn.Module, record: Record = record_symbolically, whole: Opaque | None = None
) -> tuple[fx.GraphModule, dict[str, Any], dict[str, str]]:
    """Traces `network`; a submodule whose own forward cannot be traced becomes a single call.

    Returns:
        The graph module and the scopes, as `trace` returns them, and for the name of each such submodule the
        line at which its trace failed.

    Raises:
        UntraceableError: The forward of `network` itself cannot be traced.
    """
    kept: dict[str, str] = {}
    whole = whole or Opaque()
    while True:
        try:
            graph_module, scopes = trace_with(network, whole | Opaque(frozenset(kept)), record)
        except UntraceableError as error:
            if not error.part or error.part in kept:
                raise
            kept[error.part] = error.line
        else:
            called = called_modules(graph_module)
            return graph_module, scopes, {name: line for name, line in kept.items() if name in called}
