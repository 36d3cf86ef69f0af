"""Looking at a pair once, and again only when it has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import inf, prod
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_vae import isolation
from ppl_vae.scoring import Pair, Program

Result = TypeVar("Result")
Signature = set[tuple[Any, ...]]


class Looks:
    """What was found out about pairs, for as long as it holds.

    Looking at a pair costs as much as several steps of training, so it is done once for a model, a guide and the
    kind of their arguments. It is done again when either program or anything it is made of (a function it calls, a
    network it refers to by a global name, a submodule) is another object than before, and when the sites of a run
    are not those of the run after the last look. Nothing here keeps a program alive.
    """

    def __init__(self) -> None:
        self._looks: dict[tuple[Any, ...], _Look] = {}

    def __call__(
        self, compute: Callable[[Pair, tuple[Any, ...]], Result], model: Program, guide: Program, args: tuple[Any, ...]
    ) -> Result:
        """`compute(pair, args)`, with the pair looked at."""
        parts = [*_parts(model), None, *_parts(guide)]
        kind = tuple((type(a), a.shape[1:]) if isinstance(a, Tensor) else type(a) for a in args)
        key = (*map(id, parts), kind)
        look = self._looks.get(key)
        # One datum alone does not show what belongs to a datum.
        if look is not None and look.is_of(parts) and (look.num_data > 1 or len(args[0]) == 1):
            try:
                with _Sites() as sites:
                    result = compute(look.pair.bound_to(model, guide), args)
            except (ValueError, RuntimeError, IndexError, KeyError):
                pass  # Either the programs have changed, or the look below says in words what is wrong.
            else:
                if sites.seen == look.sites:
                    return result
        pair = looked_at(model, guide, args)
        with _Sites() as sites:
            result = compute(pair, args)
        self._looks = {k: other for k, other in self._looks.items() if other.is_alive()}
        self._looks[key] = _Look(pair.bound_to(None, None), parts, sites.seen, len(args[0]))
        return result

    def __deepcopy__(self, _: object) -> Looks:
        return Looks()

    def __reduce__(self) -> tuple[type[Looks], tuple[()]]:
        return Looks, ()  # an objective may be saved; what it saw of the programs is not


class _Look:
    """What was found out about one pair, and what the pair was made of then."""

    def __init__(self, pair: Pair, parts: list[object], sites: Signature, num_data: int) -> None:
        self.pair, self.sites, self.num_data = pair, sites, num_data
        self._parts = [None if part is None else weakref.ref(part) for part in parts]

    def is_of(self, parts: list[object]) -> bool:
        return len(parts) == len(self._parts) and all(
            part is (ref and ref()) for ref, part in zip(self._parts, parts, strict=True)
        )

    def is_alive(self) -> bool:
        return all(ref() is not None for ref in self._parts if ref)


class _Sites(Messenger):
    """What decides how a run is scored: its sites, their plates, scales and masks, and the families of their values."""

    def __enter__(self) -> _Sites:
        self.seen: Signature = set()
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        frames = msg["cond_indep_stack"]
        of_plates = prod((f.full_size or f.size) / f.size for f in frames if f.vectorized)
        scale = torch.as_tensor(msg["scale"]) / of_plates
        self.seen.add(
            (
                msg["name"],
                type(msg["fn"]),
                msg["fn"].has_rsample,
                msg["mask"] is None,
                bool((scale - 1).abs().max() <= 1e-6),
                *((f.name, f.dim, f.full_size if f.full_size not in (None, f.size) else None) for f in frames),
            )
        )


def looked_at(model: Program, guide: Program, args: tuple[Any, ...]) -> Pair:
    """A pair, inspected on these data."""
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        with torch.no_grad():
            guide(*args)  # sets itself up
    return _sized(Pair(model, guide, *args), args)


def _sized(pair: Pair, args: tuple[Any, ...]) -> Pair:
    """The pair with the N of its subsampled plate on these data, not on the few that were looked at."""
    layout = pair.layout
    if layout.most_rows != inf:
        with isolation.evaluation(pair.model, pair.guide, seed=0):
            model, _ = pair.sites(args)
        frames = (frame for name in pair.latents for frame in model[name]["cond_indep_stack"])
        full_size = next(frame.full_size for frame in frames if frame.name == layout.plate)
        pair.layout = replace(layout, most_rows=full_size)
    return pair


def _parts(program: Program) -> Iterator[object]:
    """A program, and the functions, their code and the modules that it can be seen to be made of."""
    seen: set[int] = set()
    pending: list[Any] = [program]
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            yield part
            pending += [*part.children(), type(part).forward, *filter(_is_part, vars(part).values())]
        elif isinstance(part, MethodType):
            pending += [part.__func__, part.__self__]
        elif isinstance(part, partial):
            # Pyro's handlers make one of a program, and another around it that calls it `func`.
            pending += [part.func, *filter(callable, [*part.args, *part.keywords.values()])]
        elif isinstance(part, FunctionType):
            if part.__module__ and part.__module__.split(".")[0] in ("torch", "pyro"):
                continue
            yield part
            yield part.__code__
            pending += [value for cell in part.__closure__ or () if _is_part(value := _content(cell))]
            names = _names(part.__code__)
            pending += [part.__globals__[n] for n in names if _is_part(part.__globals__.get(n))]
        elif not isinstance(part, Messenger):
            yield part
            pending += [type(part).__call__] if callable(part) else []
            pending += filter(_is_part, getattr(part, "__dict__", {}).values())


def _is_part(thing: object) -> bool:
    return isinstance(thing, (nn.Module, FunctionType, MethodType, partial))


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: CodeType) -> Iterator[str]:
    """The global names that a function's code may refer to, its inner functions' among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
