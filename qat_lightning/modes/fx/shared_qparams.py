"""What only moves numbers (cat, reshape, max pooling) keeps its input's grid in int8, so in training, too.

torch.ao gives the inputs and the output of such an operation one fake-quantize, but one operation at a
time: where a concatenation reads a reshaped tensor, the reshape keeps the grid that it had before the two
were joined. Training then rounds to one grid and int8 to another, and PyTorch warns of "large numerical
inaccuracies".
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.ao.quantization import FixedQParamsFakeQuantize

from qat_lightning.modes.graph.nodes import SHARES_INPUT_QPARAMS, call_target, fake_quantize_of


def share_qparams(prepared: fx.GraphModule) -> None:
    """Gives everything that int8 keeps on one grid one fake-quantize, in place."""
    leader: dict[nn.Module, nn.Module] = {}
    for node in prepared.graph.nodes:
        if call_target(prepared, node) in SHARES_INPUT_QPARAMS:
            around = [fake_quantize_of(prepared, n) for n in (*node.all_input_nodes, *node.users)]
            groups = [_last(leader, grid) for grid in around if grid is not None and _is_free(grid)]
            leader |= {grid: first for first in groups[:1] for grid in groups}
    for node in prepared.graph.nodes:
        grid = fake_quantize_of(prepared, node)
        if grid is not None and _last(leader, grid) is not grid:
            prepared.set_submodule(str(node.target), _last(leader, grid))


def _last(leader: dict[nn.Module, Any], grid: nn.Module) -> nn.Module:
    """The fake-quantize that `grid` is to follow, or itself."""
    while leader.get(grid, grid) is not grid:
        grid = leader[grid]
    return grid


def _is_free(grid: nn.Module) -> bool:
    """Whether a grid follows the data: a sigmoid's is fixed."""
    return not isinstance(grid, FixedQParamsFakeQuantize)
