"""A pair that has been looked at, and its log weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ppl_vae.scoring.data import check_data, rows
from ppl_vae.scoring.inspection import check_site, is_delta, matching_latents, required_data_plate
from ppl_vae.scoring.layout import Layout
from ppl_vae.scoring.running import Program, Sites, Values, log_probs, loop, particles, run, scored_sites, tiles

Strategy = Callable[[Layout, Program, tuple[Any, ...], Values, int], tuple[Values, Tensor]]

# A few data and samples show every shape; the two differ so that neither can be taken for the other.
PROBE_DATA, PROBE_SAMPLES = 3, 2


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
    """

    def __init__(self, model: Program, guide: Program, *args: Any) -> None:
        check_data(*args)
        self.model, self.guide = model, guide
        # A program whose plate has a fixed size, such as an autoguide's, runs on all the data or not at all.
        parts = [] if isinstance(guide, AutoGuide) else [rows(args, slice(PROBE_DATA))]
        with pyro.validation_enabled(True):
            for probe in [*parts, args]:
                try:
                    self._inspect(probe)
                except (ValueError, RuntimeError) as error:
                    refusal = error
                    continue
                self.splits = probe is not args
                self._choose(probe)
                return
        raise refusal

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
            return self.strategy(self.layout, self.guide, args, {}, num_samples)
        fns = {name: self.layout.full_rank(site["fn"]) for name, site in encoded.items()}
        z = {name: fn(torch.Size([num_samples])) for name, fn in fns.items()}
        log_q = (scale_and_mask(fns[n].log_prob(z[n]), mask=encoded[n]["mask"]) for n in z)
        return z, self.layout.per_datum(log_q, args).expand(num_samples, -1)

    def log_joint(self, z: Values, *args: Any, num_samples: int) -> Tensor:
        """log p(x, z) at latents in canonical form, float64 `(num_samples, batch)`."""
        return self.strategy(self.layout, self.model, args, {name: z[name] for name in self.latents}, num_samples)[1]

    def blame(self, z: Values, *args: Any) -> str:
        """Which site has a log-probability of NaN or +∞ at one sample of the latents, in words."""
        for program, name in ((self.guide, "guide"), (self.model, "model")):
            trace = run(program, args, {n: self.layout.natural(n, z[n])[0] for n in self.drawn})
            for site, log_prob in zip(scored_sites(trace), log_probs(trace), strict=True):
                if not (log_prob < torch.inf).all():
                    return f"site '{site}' of the {name}"
        return "a site"

    def _inspect(self, args: tuple[Any, ...]) -> None:
        """Finds the plate over the data and refuses what has no log weight per datum."""
        try:
            guide_trace = poutine.trace(self.guide).get_trace(*args)
            model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*args)
        except ValueError as error:
            if "Shape mismatch inside plate" in str(error):
                error.add_note("A dimension that belongs to one datum needs .to_event(1) on its distribution.")
            raise
        model, guide = scored_sites(model_trace), scored_sites(guide_trace)
        self.latents = matching_latents(model, guide)
        plate, dim = required_data_plate(model, len(args[0]))
        for program, sites in (("model", model), ("guide", guide)):
            for name, site in sites.items():
                check_site(f"Site '{name}' of the {program}", site, plate, dim, len(args[0]))
        stacks = [site["cond_indep_stack"] for site in (*model.values(), *guide.values())]
        nesting = max(-frame.dim for stack in stacks for frame in stack)
        ranks = {name: len(site["fn"].batch_shape) for name, site in guide.items()}
        self.layout = Layout(plate, dim, nesting, ranks)
        # A Delta computes its value from the other sites.
        self.drawn = [name for name, site in guide.items() if not (site["is_observed"] or is_delta(site))]

    def _choose(self, args: tuple[Any, ...]) -> None:
        """Takes the first strategy that gives what one run per sample gives, at the same latents."""
        self.encodes_once = False
        z = {
            name: v
            for name, v in loop(self.layout, self.guide, args, {}, PROBE_SAMPLES)[0].items()
            if name in self.drawn
        }

        def densities(strategy: Strategy) -> tuple[Tensor, Tensor]:
            self.strategy = strategy
            values, log_q = strategy(self.layout, self.guide, args, z, PROBE_SAMPLES)
            return log_q, self.log_joint(values, *args, num_samples=PROBE_SAMPLES)

        log_q, log_p = densities(loop)
        for program, first, second in zip(("guide", "model"), (log_q, log_p), densities(loop), strict=True):
            if not _close(first, second):
                raise ValueError(
                    f"The {program} gave two densities for the same latents, so it has none: something in it is "
                    "random or keeps state, such as a functional dropout that ignores evaluation mode."
                )
        for strategy in (particles, tiles, loop):
            try:
                if all(map(_close, densities(strategy), (log_q, log_p))):
                    break
            except (RuntimeError, ValueError, IndexError):
                continue  # A network that takes one leading dimension, say; the loop ran above.
        if len(self.drawn) == len(self.layout.ranks):
            self.encodes_once = True
            fns = {name: self.layout.full_rank(site["fn"]) for name, site in self.encode(*args).items()}
            again = self.layout.per_datum((fn.log_prob(z[name]) for name, fn in fns.items()), args)
            self.encodes_once = _close(again.expand_as(log_q), log_q)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of float32 sums."""
    return torch.allclose(a, b, rtol=1e-5, atol=1e-4, equal_nan=True)
