"""Raises on every rank if the ranks captured different graphs, as from batches that take different paths."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import fx, nn

from qat_lightning.base.errors import RankMismatchError
from qat_lightning.modes.graph.graft import graphs
from qat_lightning.modes.graph.guards import is_guard
from qat_lightning.run.distributed.processes import gather


def check_same_graphs(networks: Mapping[str, nn.Module]) -> None:
    """Compares the operations of all ranks' graphs. Every rank must call it.

    Raises:
        RankMismatchError: On every rank, naming the first network whose graph differs.
    """
    digests = gather({name: _digest(network) for name, network in networks.items()})
    for name, digest in digests[0].items():
        for rank, each in enumerate(digests):
            if each.get(name) != digest:
                raise RankMismatchError(
                    f"Rank {rank} and rank 0 captured different graphs of {name or 'this module'!r}: their "
                    "batches lead through different paths of its forward. Give the LightningModule an "
                    "example_input_array, which all ranks capture."
                )


def _digest(network: nn.Module) -> str:
    found = hashlib.blake2b(digest_size=8)
    for module, graph in graphs(network):
        for node in graph.nodes:
            found.update(_describe(module, node).encode())
    return found.hexdigest()


def _describe(module: nn.Module, node: fx.Node) -> str:
    """Describes a node. What a guard expects may depend on the batch."""
    arguments = node.all_input_nodes if is_guard(module, node) else (node.args, node.kwargs)
    return f"{node.op} {node.target if isinstance(node.target, str) else node.name} {arguments}\n"
