"""Operations that the compiler makes more of when they are put in other words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.cross_entropy import log_prob_of_bits
from ppl_vae.precision import FEWER_DIGITS

_ATEN = torch.ops.aten


def rewrite(graph: GraphModule) -> None:
    """Rewrites what runs on a processor, but nothing of fewer digits, which would be rounded at other places."""
    _sum_bits_together(graph)
    _unfuse_biases(graph)


def _sum_bits_together(graph: GraphModule) -> None:
    """Sums of binary cross-entropies, as of `dist.Bernoulli(logits=...).to_event()`, with a fraction of the logarithms.

    What gradients there are do not need them, and stay as they are.
    """
    for entropy in graph.graph.find_nodes(op="call_function", target=_ATEN.binary_cross_entropy_with_logits.default):
        logits, x, *others = entropy.args
        summand, sign = entropy, -1
        while (user := _only_user(summand)) is not None and user.target in (_ATEN.neg.default, _ATEN.view.default):
            summand, sign = user, -sign if user.target is _ATEN.neg.default else sign
        shape, dtype = summand.meta["val"].shape, logits.meta["val"].dtype
        last = ([-1], [len(shape) - 1])
        if (
            others == [None, None, 0]
            and user is not None
            and user.target is _ATEN.sum.dim_IntList
            and user.args[1:] in [(dims,) for dims in last]
            and not user.kwargs
            and dtype not in FEWER_DIGITS
            and _is_on_processor(user)
        ):
            score = partial(_score, shape=shape, sign=sign)
            user.replace_all_uses_with(_inserted(graph, score, (logits, x), before=user))
            graph.graph.erase_node(user)
    graph.graph.eliminate_dead_code()


def _score(logits: Tensor, x: Tensor, *, shape: torch.Size, sign: int) -> Tensor:
    return sign * log_prob_of_bits(logits.reshape(shape), x.reshape(shape))


def _inserted(graph: GraphModule, function: Callable[..., Tensor], args: tuple[Node, ...], before: Node) -> Node:
    """What the function makes of the values of some nodes, as operations of the graph."""
    values = [node.meta["val"] for node in args]
    piece = make_fx(function)(*(torch.empty(v.shape, dtype=v.dtype, device="meta") for v in values)).graph
    with graph.graph.inserting_before(before):
        found = graph.graph.graph_copy(piece, dict(zip(piece.find_nodes(op="placeholder"), args, strict=True)))
    assert isinstance(found, Node)
    return found


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_on_processor(node: Node) -> bool:
    return node.meta["val"].device.type == "cpu"


def _unfuse_biases(graph: GraphModule) -> None:
    """Adds biases after their product of matrices, where the compiler fuses that with what comes next.

    On a processor the product with a bias is two runs over the output, of which this saves one. It is subtracted, for
    a sum would be fused into the product again.
    """
    for node in graph.graph.find_nodes(op="call_function", target=_ATEN.addmm.default):
        bias, a, b = node.args
        if node.kwargs or not _is_on_processor(node) or node.meta["val"].dtype in FEWER_DIGITS:
            continue
        with graph.graph.inserting_before(node):
            product = graph.graph.call_function(_ATEN.mm.default, (a, b))
            minus = graph.graph.call_function(_ATEN.neg.default, (bias,))
            total = graph.graph.call_function(_ATEN.sub.Tensor, (product, minus))
        node.replace_all_uses_with(total)
        graph.graph.erase_node(node)
