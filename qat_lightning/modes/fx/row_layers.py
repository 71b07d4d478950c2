"""Layers with rows of shared parameters, which the passes see as layers with parameters of their own."""

from __future__ import annotations

from torch import fx, nn

from qat_lightning.modes.trace.own_layers import RowLayer, with_own_parameters, with_rows


class RowLayers:
    """The layers with rows of shared parameters, while the passes fuse and prepare a graph.

    Args:
        graph_module: A traced network. Its layers get parameters of their own.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._shared = {
            name: (layer.whole_weight, layer.whole_bias, layer.rows)
            for name, layer in graph_module.named_modules()
            if isinstance(layer, RowLayer)
        }
        with_own_parameters(graph_module)

    def take_back(self, prepared: nn.Module) -> None:
        """Makes the layers of the prepared graph share the parameters again."""
        for name, shared in self._shared.items():
            with_rows(prepared.get_submodule(name), *shared)
