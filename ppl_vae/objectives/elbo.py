"""The ELBO as reconstruction minus KL, with a weight on the KL, its closed form, or bits that are free."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppl_vae.objectives.divergences import by_dimension, masked
from ppl_vae.objectives.objective import Objective, Terms, drawn, scheduled
from ppl_vae.scoring import Pair, log_probs, run, scored_sites


class BetaELBO(Objective):
    """E_q[log p(x given z)] − β KL(q, prior), one draw for both (Higgins et al., 2017); β = 1 is the ELBO.

    With a schedule it is KL warm-up: `BetaELBO(lambda t: min(1.0, t / 0.3))` raises β from 0 to 1 over the first 30 %
    of training. The bound of `terms` is the ELBO whatever β is.

    Args:
        beta: the weight, at least 0, or a function of the share of training done, from 0 to 1.

    Raises:
        ValueError: for a negative β; for a schedule when nothing sets `progress`; and as for `ImportanceWeightedELBO`.

    References:
        Higgins et al., beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework, 2017.
        https://openreview.net/forum?id=Sy2fzU9gl
        Bowman et al., Generating Sentences from a Continuous Space, 2016 (warm-up). https://arxiv.org/abs/1511.06349

    Example:
        >>> import torch
        >>> from ppl_vae.vae import VAE
        >>> vae = VAE((3,), latent_dim=2)
        >>> loss, bound = BetaELBO(4.0).terms(vae.model, vae.guide, torch.eye(3))
        >>> loss.shape, bound.shape
        (torch.Size([]), torch.Size([3]))
    """

    def __init__(self, beta: float | Callable[[float], float]) -> None:
        super().__init__()
        if not callable(beta):
            scheduled(self, "beta", beta)
        self.beta = beta

    def __repr__(self) -> str:
        return f"BetaELBO({'a schedule' if callable(self.beta) else self.beta})"

    def numbers(self) -> tuple[float, ...]:
        return (scheduled(self, "beta", self.beta),)

    def _terms(self, pair: Pair, args: tuple[Any, ...]) -> Terms:
        self.check_reparameterised(pair)
        (beta,) = self._present()
        _, z, log_q = drawn(pair, args, 1)
        scores = pair.scores(z, *args, num_samples=1)
        kl = (log_q - scores.latent).squeeze(0)
        log_lik = scores.observed.squeeze(0)
        # Without the KL, not 0 times what may be infinite.
        loss = -(log_lik if isinstance(beta, float) and beta == 0 else log_lik - beta * kl)
        return Terms(pair.layout.plate_scale(len(args[0])) * loss.sum(), (log_lik - kl).detach())


class AnalyticKL(Objective):
    """The ELBO with KL(q, prior) in closed form: less noise than a sampled one, and the same expectation.

    As Pyro's `TraceMeanField_ELBO`, with what it leaves to the user said: a latent without a registered formula is
    sampled with one warning, and an order of latents for which the sum of KLs is no bound is refused. A full
    covariance against a diagonal normal prior has a formula here.

    Raises:
        ValueError: when model and guide draw their latents in different orders and the guide draws one given another;
            and as for `ImportanceWeightedELBO`.

    Reference:
        Kingma & Welling, Auto-Encoding Variational Bayes, 2014, appendix B. https://arxiv.org/abs/1312.6114

    Example:
        >>> import torch
        >>> from ppl_vae.vae import VAE
        >>> vae = VAE((3,), latent_dim=2)
        >>> AnalyticKL()(vae.model, vae.guide)(torch.eye(3)).requires_grad
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return "AnalyticKL()"

    def _terms(self, pair: Pair, args: tuple[Any, ...]) -> Terms:
        once = _Once(self, pair, args)
        closed = {name: kl for name in pair.latents if (kl := once.kl(name)) is not None}
        terms = [kl.sum(list(range(kl.dim() - rank, kl.dim()))) if rank else kl for kl, rank in closed.values()]
        for name in pair.latents:
            if name not in closed:
                self._say_sampled(name, once)
                terms.append(-once.log_p[name])
        # A site of the guide alone, as an autoguide has, belongs to a latent without a formula.
        terms += [log_q for name, log_q in once.log_q.items() if name not in closed]
        bound = (once.log_lik - pair.layout.per_datum(terms, args)).squeeze(0)
        return Terms(-pair.layout.plate_scale(len(args[0])) * bound.sum(), bound.detach())

    def _say_sampled(self, name: str, once: _Once) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"No formula for KL(q, prior) of '{name}' is registered with torch ({once.guide[name]['fn']} against "
                f"{once.model[name]['fn']}), so it is sampled, as by Trace_ELBO.",
                stacklevel=2,
            )


class FreeBits(Objective):
    """−E_q[log p(x given z)] + Σ_d max(λ, KL_d): a KL below λ nats costs nothing (Kingma et al., 2016).

    KL_d is the mean over the batch of the KL of dimension d, in closed form; λ = 0 is `AnalyticKL`. A latent whose
    dimensions are not independent in both programs is one group, with λ times their number. The bound of `terms` is
    the ELBO, with the KL as it is.

    Args:
        nats: λ, at least 0, for each latent dimension.

    Raises:
        ValueError: for a negative λ; for a latent without a registered KL; and as for `AnalyticKL`.

    Reference:
        Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016, appendix C.8.
        https://arxiv.org/abs/1606.04934

    Example:
        >>> import torch
        >>> from ppl_vae.vae import VAE
        >>> vae = VAE((3,), latent_dim=2)
        >>> loss, bound = FreeBits(10.0).terms(vae.model, vae.guide, torch.eye(3))
        >>> bool(loss > -bound.sum())      # 3 data, 2 dimensions of 10 nats each, for a KL that is near 0
        True
    """

    def __init__(self, nats: float) -> None:
        super().__init__()
        self.nats = scheduled(self, "nats", nats)

    def __repr__(self) -> str:
        return f"FreeBits({self.nats})"

    def _terms(self, pair: Pair, args: tuple[Any, ...]) -> Terms:
        once, num_data = _Once(self, pair, args), len(args[0])
        loss, kls = -once.log_lik.sum(), []
        for name in pair.latents:
            found = once.kl(name)
            if found is None:
                raise ValueError(
                    f"No formula for KL(q, prior) of '{name}' is registered with torch ({once.guide[name]['fn']} "
                    f"against {once.model[name]['fn']}), so nothing says which of its bits are free. Use BetaELBO."
                )
            kl, rank = found
            kl = kl.reshape((1,) * (pair.layout.nesting + rank - kl.dim()) + kl.shape)
            event = kl.shape[pair.layout.nesting :]
            of_group = self.nats * once.guide[name]["fn"].event_shape.numel() / event.numel()
            loss = loss + num_data * kl.mean(pair.layout.nesting + pair.layout.dim).clamp(min=of_group).sum()
            kls.append(kl.reshape(*kl.shape[: pair.layout.nesting], -1).sum(-1))
        bound = (once.log_lik - pair.layout.per_datum(kls, args)).squeeze(0)
        return Terms(pair.layout.plate_scale(num_data) * loss, bound.detach())


class _Once:
    """One run of each program at the same latents.

    Attributes:
        guide, model: their sites.
        log_q: of the guide's sites, masked.
        log_p: of the model's latents, masked.
        log_lik: log p(x given z), `(1, batch)`.
    """

    def __init__(self, objective: Objective, pair: Pair, args: tuple[Any, ...]) -> None:
        objective.check_reparameterised(pair)
        self.pair = pair
        guide_trace = run(pair.guide, args, {})
        self.guide = scored_sites(guide_trace)
        given = {name: self.guide[name]["value"] for name in pair.latents}
        model_trace = run(pair.model, args, given)
        self.model = scored_sites(model_trace)
        self.log_q = dict(zip(self.guide, log_probs(guide_trace, {}), strict=True))
        log_p = dict(zip(self.model, log_probs(model_trace, given), strict=True))
        self.log_p = {name: log_p.pop(name) for name in pair.latents}
        self.log_lik = pair.layout.per_datum(log_p.values(), args)
        order = [name for name in self.guide if name in pair.latents]
        if not pair.encodes_once and order != pair.latents:
            raise ValueError(
                f"The guide draws one latent given another in the order {order}, the model in the order "
                f"{pair.latents}: a sum of KLs is a bound only where both have the same order. Change it, or use "
                "BetaELBO(1), which samples the KL."
            )

    def kl(self, name: str) -> tuple[Tensor, int] | None:
        """The KL of a latent, and how many dimensions it has right of the plates; None without a formula."""
        if name not in self.pair.drawn:  # computed from a site of the guide alone
            return None
        found = by_dimension(self.guide[name]["fn"], self.model[name]["fn"])
        return None if found is None else (masked(found[0], self.guide[name]["mask"], found[1]), found[1])
