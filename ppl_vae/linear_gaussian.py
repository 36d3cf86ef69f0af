"""Probabilistic PCA and factor analysis as a pair: the one VAE whose log p(x) and posterior are known exactly."""

from __future__ import annotations

from math import log, pi

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class LinearGaussian(nn.Module):
    """z ~ N(0, I), x given z ~ N(W z + mean, diag(noise²)), with everything about it in closed form.

    The oracle of tests and notebooks: with `lg.model` and the exact posterior `lg.guide`, every estimate of
    log p(x) must equal `lg.log_px(x)` for any number of samples; with `lg.perturbed_guide(...)` it must do so within
    its own error.

    Args:
        w: `(data_dim, latent_dim)`.
        mean: `(data_dim,)`, or a number.
        noise: the standard deviation of x given z, `(data_dim,)` or a number, positive.

    Raises:
        ValueError: when w is no floating-point matrix, or noise is not positive.

    Reference:
        Tipping & Bishop, Probabilistic Principal Component Analysis, 1999.
        https://doi.org/10.1111/1467-9868.00196

    Example:
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0]]), mean=0.0, noise=1.0)
        >>> lg.log_px(torch.zeros(1, 2))          # N(0, I + W Wᵀ) at its centre: −log 2π − ½ log 6
        tensor([-2.7338])
    """

    w: Tensor
    mean: Tensor
    noise: Tensor

    def __init__(self, w: Tensor, mean: Tensor | float, noise: Tensor | float) -> None:
        super().__init__()
        if w.dim() != 2 or not w.is_floating_point():
            raise ValueError(
                f"w must be a floating-point matrix (data_dim, latent_dim); got {w.dtype} {tuple(w.shape)}."
            )
        mean = torch.as_tensor(mean, dtype=w.dtype).expand(w.shape[0])
        noise = torch.as_tensor(noise, dtype=w.dtype).expand(w.shape[0])
        if not bool((noise > 0).all()):
            raise ValueError(f"noise is a standard deviation and must be positive; got {noise.min():.4g}.")
        self.register_buffer("w", w.detach().clone())
        self.register_buffer("mean", mean.clone())
        self.register_buffer("noise", noise.clone())

    @property
    def precision(self) -> Tensor:
        """Λ = I + Wᵀ Ψ⁻¹ W, the precision of the posterior, `(latent_dim, latent_dim)`; the same for every x."""
        scaled = self.w / self.noise[:, None]
        return torch.eye(self.w.shape[1]).to(self.w) + scaled.T @ scaled

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """The exact p(z given x) = N(Λ⁻¹ Wᵀ Ψ⁻¹ (x − mean), Λ⁻¹), for x of shape `(*batch, data_dim)`."""
        loc = torch.linalg.solve(self.precision, ((x - self.mean) / self.noise**2 @ self.w).unsqueeze(-1))
        return dist.MultivariateNormal(loc.squeeze(-1), precision_matrix=self.precision)

    def log_px(self, x: Tensor) -> Tensor:
        """The exact log p(x) in nats: `(*batch, data_dim)` to `(*batch,)`.

        −½ [P log 2π + log|C| + (x − mean)ᵀ C⁻¹ (x − mean)] with C = W Wᵀ + Ψ, by way of the small matrix Λ.
        """
        residual = (x - self.mean) / self.noise
        projected = residual @ (self.w / self.noise[:, None])
        explained = (projected * self.posterior(x).mean).sum(-1)
        log_det = torch.logdet(self.precision) + 2 * self.noise.log().sum()
        return -0.5 * (x.shape[-1] * log(2 * pi) + log_det + residual.square().sum(-1) - explained)

    def model(self, x: Tensor | None = None, *, num_data: int = 1) -> Tensor:
        """The generative program; without x, draws `num_data` of them."""
        latent_dim = self.w.shape[1]
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim).to(self.w), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z @ self.w.T + self.mean, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """The exact posterior as a guide."""
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(x))

    def perturbed_guide(self, *, shift: float = 0.5, spread: float = 1.2) -> LinearGaussianGuide:
        """A guide that is wrong by a known amount: see `LinearGaussianGuide`."""
        return LinearGaussianGuide(self, shift=shift, spread=spread)


class LinearGaussianGuide(nn.Module):
    """A diagonal normal whose mean is off by `shift` and whose scale is `spread` times the best diagonal's.

    Both in units of the best diagonal posterior's standard deviation Λ_ii^−½, so that the ELBO of this guide has a
    closed form too.

    Example:
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0]]), mean=0.0, noise=1.0)
        >>> guide = lg.perturbed_guide(shift=0.3, spread=1.1)
        >>> bool(guide.elbo(torch.zeros(1, 2)) < lg.log_px(torch.zeros(1, 2)))
        True
    """

    def __init__(self, exact: LinearGaussian, *, shift: float, spread: float) -> None:
        super().__init__()
        self.exact, self.shift, self.spread = exact, shift, spread

    def q(self, x: Tensor) -> dist.TorchDistribution:
        """q(z given x), for x of shape `(*batch, data_dim)`."""
        scale = self.exact.precision.diagonal().rsqrt()
        return dist.Normal(self.exact.posterior(x).mean + self.shift * scale, self.spread * scale).to_event(1)

    def elbo(self, x: Tensor) -> Tensor:
        """The exact ELBO of this guide, log p(x) − KL(q, posterior), in nats: `(*batch,)`."""
        q = dist.MultivariateNormal(
            (base := self.q(x).base_dist).loc, scale_tril=torch.diag_embed(base.scale.expand_as(base.loc))
        )
        return self.exact.log_px(x) - torch.distributions.kl_divergence(q, self.exact.posterior(x))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.q(x))
