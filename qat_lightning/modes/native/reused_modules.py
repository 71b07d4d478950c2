"""Gives each call of a module that a graph calls several times its own int8 qparams."""

from __future__ import annotations

import copy

from torch import fx

from qat_lightning.modes.graph.nodes import fake_quantize_of


def copy_reused_modules(prepared: fx.GraphModule) -> None:
    """Gives each further call of a module in a prepared graph a copy of the module, in place.

    An int8 layer, batch-norm or hardswish holds the scale and the zero point of its output. torch.ao makes
    only one of each module, however often it is called, with the qparams of one of the calls.
    """
    called: dict[str, int] = {}
    for node in prepared.graph.nodes:
        if node.op != "call_module" or fake_quantize_of(prepared, node) is not None:
            continue
        name = str(node.target)
        called[name] = count = called.get(name, 0) + 1
        if count > 1:
            node.target = f"{name}_call_{count}"
            prepared.add_submodule(node.target, copy.deepcopy(prepared.get_submodule(name)))
    prepared.recompile()
