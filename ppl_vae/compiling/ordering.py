"""The order of operations in a graph: a write comes as soon as it may."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from ppl_vae.compiling.recording import is_view


class WritesEarly(CustomGraphPass):
    """Moves each write to a tensor of the state up to where its value is known and the old one no longer needed.

    The compiler leaves them at the end, when what they write has long left the processor's caches. It keeps what it
    compiled under the text of this file, among others.
    """

    def __call__(self, graph: Graph) -> None:
        places = {node: place for place, node in enumerate(graph.nodes)}
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
            target, value = node.args
            before = [value, *(reader for reader in _readers(target) if reader is not node)]
            max(before, key=places.__getitem__).append(node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _readers(node: Node) -> Iterator[Node]:
    """All that use its value, or the value of a view of it."""
    for user in node.users:
        yield user
        if is_view(user):
            yield from _readers(user)
