"""A pair that has been looked at, and its log weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import copy
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from ppl_vae import isolation, precision
from ppl_vae.scoring.data import check_data, rows
from ppl_vae.scoring.inspection import check_site, check_vectorised, data_plates, is_delta, matching_latents, no_plate
from ppl_vae.scoring.layout import Layout
from ppl_vae.scoring.running import (
    Program,
    Scores,
    Sites,
    Values,
    log_probs,
    loop,
    particles,
    run,
    scored_sites,
    tiles,
)
from ppl_vae.scoring.supports import log_prob_anywhere

Strategy = Callable[[Layout, Program, tuple[Any, ...], Values, int], Scores]

# A few data and samples show every shape; the two differ so that neither can be taken for the other.
PROBE_DATA, PROBE_SAMPLES = 6, 2


def log_weights(model: Program, guide: Program, *args: Any, num_samples: int) -> Tensor:
    """Draws z from the guide and returns log p(x, z) − log q(z given x), in nats, for each sample and datum.

    Their exponentials average to p(x): log p(x) is estimated by `logsumexp(0) - log(num_samples)`, the ELBO by
    `mean(0)`. Gradients flow unless switched off; `importance_sampling` evaluates in bounded memory.

    Args:
        model: p(x, z), a Pyro program whose latent and observed sites all lie in one plate over the data.
        guide: q(z given x), with the same arguments.
        *args: what both take; a tensor with as many rows as the first has one row per datum.
        num_samples: draws of z for each datum.

    Returns:
        float64 `(num_samples, batch)`.

    Raises:
        ValueError: when the pair has no log weight per datum; the sentence names the site and the way out.

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0]]).double(), mean=0.0, noise=1.0)
        >>> x = lg.model(num_data=3)
        >>> lw = log_weights(lg.model, lg.guide, x, num_samples=5)      # the exact posterior: no variance
        >>> lw.shape, torch.allclose(lw, lg.log_px(x))
        (torch.Size([5, 3]), True)
    """
    return Pair(model, guide, *args).log_weights(*args, num_samples=num_samples)


class Pair:
    """A model and a guide that have been looked at: what is in their plates, and how to draw many samples at once.

    Attributes:
        layout: where samples, plates and data lie in the shapes of its sites.
        latents: names of the sites of z.
        strategy: `particles`, `tiles` or `loop`, the first that agrees with one run per sample.
        encodes_once: whether one run of the guide serves all samples of a datum. It does unless the guide draws one
            latent given another.
        splits: whether the data may be given in parts; not so for an autoguide, which has parameters for each datum.
        without_rsample: names of the guide's sites through whose draws no gradient flows.
        rounded_to: to what its operations round, if to fewer digits than float32 has: see `precision.Digits`.
    """

    def __init__(self, model: Program, guide: Program, *args: Any) -> None:
        check_data(*args)
        self._bind(model, guide)
        # An autoguide has parameters for each datum: it runs on all the data or not at all, as does a program whose
        # plate has a fixed size.
        whole = isinstance(guide, (AutoGuide, GuideMessenger))
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
            raise ValueError(
                "The autoguide has not run yet, so it has no parameters, and would be set up for the data that are to "
                "be scored. Train it first."
            )
        with isolation.evaluation(model, guide, seed=0), pyro.validation_enabled(True):
            for probe in [args] if whole else [rows(args, slice(PROBE_DATA)), args]:
                try:
                    with precision.Digits() as digits:
                        self._inspect(probe)
                except (ValueError, RuntimeError) as error:
                    refusal = error
                    continue
                self.splits, self.rounded_to = probe is not args, digits.rounded_to
                self._choose(probe)
                return
        if whole:
            raise ValueError(f"An autoguide can be scored only on the data it was trained on. {refusal}") from refusal
        raise refusal

    def _bind(self, model: Any, guide: Any) -> None:
        self.model, self.guide = model, guide
        if isinstance(guide, GuideMessenger):
            # Such a guide runs the model, whose observed sites have no part in q.
            self.guide = poutine.block(guide, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])

    def bound_to(self, model: Program | None, guide: Program | None) -> Pair:
        """A copy with what was found out, for the same programs; with None it keeps no program alive."""
        pair = copy(self)
        pair._bind(model, guide)
        return pair

    def log_weights(self, *args: Any, num_samples: int) -> Tensor:
        """log p(x, z) − log q(z given x) at draws from the guide, float64 `(num_samples, batch)`."""
        z, log_q = self.draw(self.encode(*args), *args, num_samples=num_samples)
        return self.log_joint(z, *args, num_samples=num_samples) - log_q

    def encode(self, *args: Any) -> Sites:
        """What the guide says of the data, from which `draw` takes samples: the encoder runs here."""
        return scored_sites(run(self.guide, args, {})) if self.encodes_once else {}

    def draw(self, encoded: Sites, *args: Any, num_samples: int) -> tuple[Values, Tensor]:
        """Latents in canonical form and their log q(z given x), float64 `(num_samples, batch)`."""
        if not self.encodes_once:
            drawn = self.strategy(self.layout, self.guide, args, {}, num_samples)
            return drawn.values, drawn.total
        fns = {name: self.layout.full_rank(site["fn"]) for name, site in encoded.items()}
        z = {name: fn(torch.Size([num_samples])) for name, fn in fns.items()}
        return z, self.log_q(encoded, z, *args, num_samples=num_samples)

    def draw_prior(self, *args: Any, num_samples: int) -> Values:
        """Latents from the model's own prior, in canonical form."""
        drawn = self.strategy(self.layout, self.model, args, {}, num_samples).values
        return {name: drawn[name] for name in self.latents}

    def log_q(self, encoded: Sites, z: Values, *args: Any, num_samples: int) -> Tensor:
        """log q(z given x) of any latents in canonical form, float64 `(num_samples, batch)`."""
        if not self.encodes_once:
            given = {name: z[name] for name in self.drawn}
            return self.strategy(self.layout, self.guide, args, given, num_samples).total
        fns = {name: self.layout.full_rank(site["fn"]) for name, site in encoded.items()}
        log_q = (scale_and_mask(log_prob_anywhere(fn, z[n]), mask=encoded[n]["mask"]) for n, fn in fns.items())
        return self.layout.per_datum(log_q, args).expand(num_samples, -1)

    def log_joint(self, z: Values, *args: Any, num_samples: int) -> Tensor:
        """log p(x, z) at latents in canonical form, float64 `(num_samples, batch)`."""
        return self.scores(z, *args, num_samples=num_samples).total

    def scores(self, z: Values, *args: Any, num_samples: int) -> Scores:
        """log p(z) and log p(x given z), apart, at latents in canonical form."""
        return self.strategy(self.layout, self.model, args, {name: z[name] for name in self.latents}, num_samples)

    def blame(self, z: Values, *args: Any) -> str:
        """Which site has a log-probability of NaN or +∞ at one sample of the latents, in words."""
        for program, name in ((self.guide, "guide"), (self.model, "model")):
            trace = run(program, args, {n: self.layout.natural(n, z[n])[0] for n in self.drawn})
            for site, log_prob in zip(scored_sites(trace), log_probs(trace, z), strict=True):
                if not (log_prob < torch.inf).all():
                    return f"site '{site}' of the {name}"
        return "a site"

    def _inspect(self, args: tuple[Any, ...]) -> None:
        """Finds the plate over the data and refuses what has no log weight per datum."""
        model, guide = self.sites(args)
        sites = {f"Site '{name}' of the model": site for name, site in model.items()}
        sites |= {f"Site '{name}' of the guide": site for name, site in guide.items()}
        for who, site in sites.items():
            check_vectorised(who, site)
        self.latents = matching_latents(model, guide)
        plate, dim = self._plate_over_the_data(model, args)
        for who, site in sites.items():
            check_site(who, site, plate, dim, len(args[0]))
        stacks = [site["cond_indep_stack"] for site in sites.values()]
        nesting = max(-frame.dim for stack in stacks for frame in stack)
        ranks = {name: len(site["fn"].batch_shape) for name, site in guide.items()}
        of_data = next(f for stack in stacks for f in stack if f.name == plate)
        subsampled = of_data.full_size not in (None, of_data.size)
        self.layout = Layout(plate, dim, nesting, ranks, most_rows=of_data.full_size if subsampled else torch.inf)
        self.without_rsample = [name for name, site in guide.items() if not site["fn"].has_rsample]
        # A Delta computes its value from the other sites.
        self.drawn = [name for name, site in guide.items() if not (site["is_observed"] or is_delta(site))]

    def sites(self, args: tuple[Any, ...]) -> tuple[Sites, Sites]:
        """The sites of the model and of the guide on these data, at the same latents."""
        try:
            guide_trace = poutine.trace(self.guide).get_trace(*args)
            model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*args)
        except ValueError as error:
            if "Shape mismatch inside plate" not in str(error):
                raise
            raise ValueError(
                f"{str(error).splitlines()[0]}. A dimension that belongs to one datum needs .to_event(1) on its "
                "distribution."
            ) from error
        return scored_sites(model_trace), scored_sites(guide_trace)

    def _plate_over_the_data(self, model: Sites, args: tuple[Any, ...]) -> tuple[str, int]:
        """Name and dimension; where several plates are as long as the data, the one that shortens with them."""
        num_data = len(args[0])
        found = data_plates(model, num_data)
        if len(found) > 1 and num_data > 1:
            with suppress(ValueError, RuntimeError):  # of programs that run on all the data or not at all
                shorter = data_plates(self.sites(rows(args, slice(num_data - 1)))[0], num_data - 1)
                found = {name: dim for name, dim in found.items() if name in shorter}
        if not found:
            raise ValueError(no_plate(model, num_data))
        if len(found) > 1 and "data" not in found:
            raise ValueError(
                f"The plates {list(found)} are all as long as the data; name the one over the data 'data'."
            )
        name = "data" if "data" in found else next(iter(found))
        return name, found[name]

    def _choose(self, args: tuple[Any, ...]) -> None:
        """Takes the first strategy that gives what one run per sample gives, at the same latents."""
        self.encodes_once = False

        def densities(strategy: Strategy, args: tuple[Any, ...], z: Values) -> tuple[Tensor, Tensor]:
            self.strategy = strategy
            drawn = strategy(self.layout, self.guide, args, z, PROBE_SAMPLES)
            return drawn.total, self.log_joint(drawn.values, *args, num_samples=PROBE_SAMPLES)

        def compare(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], complaint: str) -> None:
            for program, one, other in zip(("guide", "model"), found, expected, strict=True):
                if not _close(one, other):
                    raise ValueError(f"The {program} {complaint}")

        try:
            drawn = loop(self.layout, self.guide, args, {}, PROBE_SAMPLES).values
            z = {name: value for name, value in drawn.items() if name in self.drawn}
            truth = densities(loop, args, z)
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                "The guide cannot give the density of latents that it has not just drawn, as a flow without an inverse "
                "cannot. Use one that can, such as an affine autoregressive or a coupling flow."
            ) from error
        compare(
            densities(loop, args, z),
            truth,
            "gave two densities for the same latents, so it has none: something in it is random or keeps state, such "
            "as a functional dropout that ignores evaluation mode, or a plate that draws its own subsample.",
        )
        batches = [(args, z, truth)]
        if self.splits and len(args[0]) > 1:
            # The second half by itself: what belongs to a datum must not depend on the batch it comes in.
            half = len(args[0]) // 2
            axis = 1 + self.layout.nesting + self.layout.dim
            second = {name: value.narrow(axis, half, len(args[0]) - half) for name, value in z.items()}
            expected = truth[0][:, half:], truth[1][:, half:]
            alone = rows(args, slice(half, None))
            try:
                found = densities(loop, alone, second)
            except (ValueError, RuntimeError, IndexError):
                self.splits = False  # It runs on these data or on none.
            else:
                compare(
                    found,
                    expected,
                    "gives a datum another density in another batch: it uses the plate's index, or statistics of the "
                    "batch. Pass what belongs to each datum as an argument, `model(x, y)`.",
                )
                batches.append((alone, second, expected))
        for strategy in (particles, tiles, loop):
            try:
                if all(all(map(_close, densities(strategy, a, z), expected)) for a, z, expected in batches):
                    break
            except (RuntimeError, ValueError, IndexError):
                continue  # A network that takes one leading dimension, say; the loop ran above.
        if len(self.drawn) == len(self.layout.ranks) and self._draws_apart(args, z):
            self.encodes_once = True
            encoded = self.encode(*args)
            # Supports may depend on what was drawn; then densities differ, and that is all that is asked here.
            again = self.log_q(encoded, z, *args, num_samples=PROBE_SAMPLES)
            self.encodes_once = _close(again, truth[0])

    def _draws_apart(self, args: tuple[Any, ...], z: Values) -> bool:
        """Whether the guide computes no latent from another.

        A look at numbers alone may miss what happens for other data, so that gradients are followed; where there are
        integers, which have none, a latent is taken to depend on them.
        """
        if len(z) < 2:
            return True
        if not all(value.is_floating_point() for value in z.values()):
            return False
        with torch.enable_grad():
            given = {name: self.layout.natural(name, z[name])[0].detach().requires_grad_() for name in z}
            for site in scored_sites(run(self.guide, args, given)).values():
                log_prob = log_prob_anywhere(site["fn"], site["value"].detach())
                if log_prob.requires_grad:
                    slopes = torch.autograd.grad(
                        log_prob.sum(), list(given.values()), retain_graph=True, allow_unused=True
                    )
                    if any(slope is not None for slope in slopes):
                        return False
        return True


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of float32 sums."""
    return torch.allclose(a, b, rtol=1e-5, atol=1e-4, equal_nan=True)
