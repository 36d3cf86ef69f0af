"""One step of several processes, each with its share of a batch: the gradient of one process on the whole batch.

The loss per datum of a batch is the mean of those of its shares, each with the weight of its number of data; and so
are its gradient and the bound. For a plate over N data of which B are in the batch, `plate("data", N,
subsample_size=len(x))`, that is so of everything in the loss: a share scales its own data by N / len(x), and what all
data have in common once. For a plate that is as long as the batch, what all data have in common would be counted by
each process; `Partly` has each count as much of it as it has of the data.

`DistributedDataParallel` is not used: it wraps a module, and a pair may be functions whose parameters are plain tensors
in Pyro's store; it averages over processes, not over data; and it never sees a gradient from `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from pyro.infer import JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_vae import parameters, processes, scoring
from ppl_vae.batches import Batch
from ppl_vae.scoring import Program

Sums = tuple[float, float, float]  # of the losses and bounds of data, and how many data

RECORDED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


def check(model: Program, guide: Program, objective: Any, batch: Batch, plates: set[str]) -> None:
    """Refuses what cannot be trained in shares: without a plate over the data, or with one that knows its length.

    Raises:
        ValueError: with what is wrong.
    """
    if isinstance(objective, RECORDED):
        raise ValueError(
            f"{type(objective).__name__} records the program for one size of batch, and several processes have shares "
            "of different sizes. Take another objective, such as Trace_ELBO()."
        )
    if not plates:
        raise ValueError(
            "No plate of the model is over the data, so nothing says what several processes should count once. Put "
            'what belongs to a datum in `with pyro.plate("data", len(x)):`.'
        )
    num_data = len(batch[0])
    some = max(1, num_data // processes.world_size())
    _, _, sites = parameters.find(model, guide, scoring.rows(batch, slice(some)))
    for site in sites.values():
        for frame in site["cond_indep_stack"]:
            if frame.name in plates and frame.size != some:
                raise ValueError(
                    f"The plate '{frame.name}' is {frame.size} long for {some} data, and several processes have shares "
                    f'of different sizes. Let it follow its data: `pyro.plate("{frame.name}", len(x))`, or '
                    f'`pyro.plate("{frame.name}", N, subsample_size=len(x))`.'
                )


def synchronise(tensors: dict[str, Tensor]) -> None:
    """Gives every process the values of the first.

    Raises:
        ValueError: when the first has others than this one, by name or shape.
    """
    if processes.world_size() == 1:
        return
    values = processes.from_first(lambda: {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    here, there = ({name: tensor.shape for name, tensor in of.items()} for of in (tensors, values))
    if here != there or list(here) != list(there):
        name = next((n for n in (*here, *there) if here.get(n) != there.get(n)), "their order")
        raise ValueError(
            f"The pair is not the same in process {processes.rank()} as in the first: '{name}' differs. Build it alike "
            "in all of them."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def summed(differentiate: Callable[[], Sums], trained: parameters.Parameters, num_data: int) -> Sums:
    """Leaves the gradient of the loss per datum in the parameters, for the data of all processes together.

    Args:
        differentiate: does so for the data of this process, and returns numbers to be summed.
        trained: the parameters.
        num_data: how many data this process has; where there are none, it is not called.

    Returns:
        The sums of what `differentiate` returns, which are three, the last of them the number of data.
    """
    if processes.world_size() == 1:
        return differentiate()
    leaves = list(trained.values())
    dtype = reduce(torch.promote_types, [p.dtype for p in leaves], torch.float32)
    sizes = [p.numel() for p in leaves]
    with processes.summing(sum(sizes) + len(leaves) + 3, dtype=dtype, device=leaves[0].device) as total:
        *parts, given, terms = total.split([*sizes, len(leaves), 3])
        if num_data:
            terms += torch.tensor(differentiate(), dtype=torch.float64).to(terms)
            for index, (p, part) in enumerate(zip(leaves, parts, strict=True)):
                if p.grad is not None:
                    part += num_data * p.grad.reshape(-1).to(part)
                    given[index] = 1
    total[: sum(sizes)] /= terms[-1]
    for p, part, known in zip(leaves, parts, given.tolist(), strict=True):
        # A parameter without a gradient in all processes has none, as with one process.
        p.grad = torch.empty_like(p).copy_(part.view_as(p)) if known else None
    loss, bound, count = terms.tolist()
    return loss, bound, count


def counted_once(plates: set[str], num_data: int) -> AbstractContextManager[Any]:
    """Lets all processes together count once, inside, what lies outside of the plates over the data."""
    if processes.world_size() == 1:
        return nullcontext()
    with processes.summing(1) as total:
        total += num_data
    return Partly(plates, num_data / total.item())


class Partly(Messenger):
    """Scales every site outside of some plates."""

    def __init__(self, plates: set[str], scale: float) -> None:
        super().__init__()
        self.plates, self.scale = plates, scale

    def _pyro_sample(self, msg: Any) -> None:
        if not any(frame.name in self.plates for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.scale
