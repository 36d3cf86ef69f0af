"""Importance-weighted bounds log 1/K Σ w, and four ways to their gradient."""

from __future__ import annotations

import warnings
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ppl_vae.objectives.objective import Objective, Terms, drawn
from ppl_vae.scoring import Pair, Values


class ImportanceWeightedELBO(Objective):
    """log 1/K Σ_k p(x, z_k) / q(z_k given x), z_k ~ q, for each datum (Burda et al., 2016); the loss is minus its sum.

    Its expectation rises with K from the ELBO to log p(x). The gradient is the bound's own. That of the encoder
    drowns in noise as K grows (Rainforth et al., 2018): `DReG` has the same expectation and does not.

    The logarithm is taken datum by datum, and the N / B of a subsampled plate is outside of it.

    Args:
        num_particles: K.
        max_particles_at_once: how many particles are held in memory; the others are computed again when their
            gradient is asked for. The gradient is exact, at the price of about one more forward pass.

    Raises:
        ValueError: for num_particles below 1; when first used, for a pair without a log weight per datum, and for a
            guide site without rsample.

    Reference:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016. https://arxiv.org/abs/1509.00519

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0]]).double(), mean=0.0, noise=1.0)
        >>> x = lg.model(num_data=3)
        >>> loss = ImportanceWeightedELBO(num_particles=5)(lg.model, lg.guide)(x)   # the guide is the exact posterior
        >>> torch.allclose(loss, -lg.log_px(x).sum())
        True
    """

    def __init__(self, *, num_particles: int, max_particles_at_once: int | None = None) -> None:
        super().__init__(num_particles=num_particles)
        at_once = num_particles if max_particles_at_once is None else max_particles_at_once
        if not isinstance(at_once, int) or at_once < 1:
            raise ValueError(f"max_particles_at_once must be an integer of at least 1; got {at_once!r}.")
        self.max_particles_at_once = at_once
        self._warned = False

    def _terms(self, pair: Pair, args: tuple[Any, ...]) -> Terms:
        self.check_reparameterised(pair)
        path = _Path()
        log_w, _ = self._particles(pair, args, path)
        log_w, bound = self._bound(log_w)
        path.weights = log_w.detach().softmax(0)
        return Terms(-pair.layout.plate_scale(len(args[0])) * bound.sum(), bound.detach())

    def check(self, found: Terms) -> None:
        lost = found.bound == -torch.inf
        if not self._warned and bool(lost.any()):
            self._warned = True
            warnings.warn(
                f"All {self.num_particles} importance weights of {int(lost.sum())} of {len(lost)} data are 0, so their "
                "bound is −∞ and they give no gradient. Does the guide reach where the model has mass, and are the "
                "data in the likelihood's support?",
                stacklevel=3,
            )

    def _particles(self, pair: Pair, args: tuple[Any, ...], path: _Path) -> tuple[Tensor, Tensor]:
        """log w and log q of all particles, `(num_particles, batch)`, no more of them in memory than were allowed."""
        parts = []
        for start in range(0, self.num_particles, self.max_particles_at_once):
            count = min(self.max_particles_at_once, self.num_particles - start)
            some = partial(self._some_particles, pair, args, count, partial(path.slope, start, count))
            if count == self.num_particles or not torch.is_grad_enabled():
                parts.append(some())
            else:
                with set_checkpoint_early_stop(False):
                    parts.append(checkpoint(lambda *_, some=some: some(), *args, use_reentrant=False))
        log_w, log_q = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return log_w, log_q

    def _some_particles(self, pair: Pair, args: tuple[Any, ...], count: int, slope: Any) -> tuple[Tensor, Tensor]:
        """log w and log q of `count` draws."""
        _, z, log_q = drawn(pair, args, count)
        return pair.log_joint(z, *args, num_samples=count) - log_q, log_q

    def _check_same_density(self, one: Tensor, other: Tensor) -> None:
        """Refuses a guide without one density; not while it is recorded, before which it has run."""
        if self._recorded is None and not torch.allclose(one, other, rtol=1e-5, atol=1e-4, equal_nan=True):
            raise ValueError(
                "The guide draws one latent given another and gave two densities for the same draws, as it does with a "
                "dropout in training mode, so that no gradient can be taken along their path. Take the dropout out of "
                "the guide, or use ImportanceWeightedELBO."
            )

    def _bound(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """log 1/K Σ w of each datum, and the log weights with those of a datum without any weight set to 0.

        A datum all of whose weights are 0 has the bound −∞ and no gradient.
        """
        lost = (log_w == -torch.inf).all(0)
        kept = log_w.masked_fill(lost, 0.0)
        return kept, (kept.logsumexp(0) - log(self.num_particles)).masked_fill(lost, -torch.inf)


class DReG(ImportanceWeightedELBO):
    """The importance-weighted bound with the doubly reparameterised gradient (Tucker et al., 2019).

    With normalised weights v_k = w_k / Σ w, the encoder's gradient is Σ_k v_k² ∂log w_k/∂z_k · dz_k/dφ, log q's own
    parameters held fixed. It has the expectation of `ImportanceWeightedELBO`'s gradient and a signal-to-noise ratio
    that grows with K; where the guide is the exact posterior it is 0 draw by draw. The decoder's gradient is the same.

    It is right for several latents and for guides that draw one given another, in whatever form the guide is.

    Args:
        num_particles: K.
        max_particles_at_once: as for `ImportanceWeightedELBO`.

    Raises:
        ValueError: as for `ImportanceWeightedELBO`; and for a guide with a density that changes from run to run (a
            dropout) and that draws one latent given another.

    Reference:
        Tucker, Lawson, Gu & Maddison, Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, 2019.
        https://arxiv.org/abs/1810.04152

    Example:
        >>> from ppl_vae.vae import VAE
        >>> vae = VAE((3,), latent_dim=2)
        >>> loss = DReG(num_particles=5)(vae.model, vae.guide)(torch.eye(3))
        >>> loss.backward()
        >>> all(p.grad is not None for p in vae.parameters())
        True
    """

    squared = True

    def _some_particles(self, pair: Pair, args: tuple[Any, ...], count: int, slope: Any) -> tuple[Tensor, Tensor]:
        encoded, z, log_q = drawn(pair, args, count)
        axes = {name: 1 + pair.layout.nesting + pair.layout.dim for name in z}
        along = {name: _Scaled.apply(value, axes[name], slope if self.squared else None) for name, value in z.items()}
        at_path = pair.log_q(encoded, along, *args, num_samples=count)
        at_rest = pair.log_q(encoded, _detached(z), *args, num_samples=count)
        if not encoded:
            self._check_same_density(log_q, at_path)
        # log q with its own parameters held fixed: what they do to the one they undo in the other.
        held = at_path - (at_rest - at_rest.detach())
        return pair.log_joint(along, *args, num_samples=count) - held, log_q


class StickingTheLanding(DReG):
    """The bound with the path gradient of Roeder et al. (2017): log q's own parameters are held fixed.

    For one particle, the ELBO, the encoder's gradient is ∂log w/∂z · dz/dφ: unbiased, and 0 draw by draw where the
    guide is the exact posterior. For K > 1 it is Σ_k v_k ∂log w_k/∂z_k · dz_k/dφ, which is *biased* for the
    importance-weighted bound (Tucker et al., 2019): use `DReG` there.

    Args:
        num_particles: K.
        max_particles_at_once: as for `ImportanceWeightedELBO`.

    Raises:
        ValueError: as for `DReG`.

    Reference:
        Roeder, Wu & Duvenaud, Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
        Inference, 2017. https://arxiv.org/abs/1703.09194

    Example:
        >>> from ppl_vae.vae import VAE
        >>> vae = VAE((3,), latent_dim=2)
        >>> StickingTheLanding()(vae.model, vae.guide)(torch.eye(3)).requires_grad
        True
    """

    squared = False

    def __init__(self, *, num_particles: int = 1, max_particles_at_once: int | None = None) -> None:
        super().__init__(num_particles=num_particles, max_particles_at_once=max_particles_at_once)


class VIMCO(ImportanceWeightedELBO):
    """The importance-weighted bound L with a gradient for any guide, also one with discrete latents (Mnih & Rezende,
    2016).

    The encoder's gradient is Σ_k (L − L_−k) ∂log q(z_k given x)/∂φ + ∂L/∂φ at fixed draws, where L_−k is the bound
    with w_k replaced by the geometric mean of the other weights: unbiased, and far less noisy than with L alone. No
    gradient flows through draws, so that for continuous latents `DReG` is better.

    Args:
        num_particles: K, at least 2.
        max_particles_at_once: as for `ImportanceWeightedELBO`.

    Raises:
        ValueError: for fewer than 2 particles, and as for `ImportanceWeightedELBO`, but for the rsample.

    Reference:
        Mnih & Rezende, Variational Inference for Monte Carlo Objectives, 2016. https://arxiv.org/abs/1602.06725

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> logit = torch.zeros((), requires_grad=True)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=logit))
        >>> VIMCO(num_particles=5)(model, guide)(torch.ones(3)).backward()
        >>> bool(logit.grad != 0)
        True
    """

    def __init__(self, *, num_particles: int, max_particles_at_once: int | None = None) -> None:
        super().__init__(num_particles=num_particles, max_particles_at_once=max_particles_at_once)
        if num_particles < 2:
            raise ValueError("VIMCO compares a particle with the others, so it needs num_particles of at least 2.")

    def _terms(self, pair: Pair, args: tuple[Any, ...]) -> Terms:
        log_w, log_q = self._particles(pair, args, _Path())
        kept, bound = self._bound(log_w)
        signal = kept.logsumexp(0) - _without_each(kept).logsumexp(1)
        score = (signal.detach() * log_q).sum(0)
        surrogate = bound + (score - score.detach())
        return Terms(-pair.layout.plate_scale(len(args[0])) * surrogate.sum(), bound.detach())

    def _some_particles(self, pair: Pair, args: tuple[Any, ...], count: int, slope: Any) -> tuple[Tensor, Tensor]:
        encoded, z, log_q = drawn(pair, args, count)
        if any(value.requires_grad for value in z.values()):
            z, first = _detached(z), log_q
            log_q = pair.log_q(encoded, z, *args, num_samples=count)
            if not encoded:
                self._check_same_density(first, log_q)
        return pair.log_joint(z, *args, num_samples=count) - log_q, log_q


class _Path:
    """The normalised weights `(num_particles, batch)`, known only after all particles have been scored."""

    weights: Tensor

    def slope(self, start: int, count: int) -> Tensor:
        return self.weights[start : start + count]


class _Scaled(torch.autograd.Function):
    """A latent as it is, the gradient of whose path is multiplied by the weight of its particle."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: int, slope: Any) -> Tensor:
        ctx.axis, ctx.slope = axis, slope
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.slope is not None:
            weights = ctx.slope()
            shape = [len(weights)] + [1] * (gradient.dim() - 1)
            shape[ctx.axis] = weights.shape[1]
            gradient = gradient * weights.reshape(shape).to(gradient)
        return gradient, None, None


def _detached(z: Values) -> Values:
    return {name: value.detach() for name, value in z.items()}


def _without_each(log_w: Tensor) -> Tensor:
    """log weights with each in turn replaced by the mean of the other logarithms: `(K, K, batch)`, the turn first."""
    num = len(log_w)
    others = log_w.expand(num, *log_w.shape).masked_fill(torch.eye(num, device=log_w.device).bool()[..., None], 0.0)
    mean = others.sum(1) / (num - 1)
    return torch.where(torch.eye(num, device=log_w.device).bool()[..., None], mean[:, None], log_w)
