"""A bent coin: maximum likelihood with everything explicit, then the same coin with a prior.

`model` and `guide` are the smallest pair there is: no latent, one parameter, and an empty guide, so that the negative
ELBO is the negative log-likelihood and SVI is maximum likelihood. `BetaBernoulli` gives the probability of heads a
prior; its log p(tosses) and its posterior are known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import constraints


def model(tosses: Tensor) -> None:
    """Each toss, 0 or 1, of shape `(num_tosses,)`, is Bernoulli with the one parameter `probability`."""
    probability = pyro.param("probability", torch.tensor(0.5), constraint=constraints.unit_interval)
    with pyro.plate("data", len(tosses)):
        pyro.sample("x", dist.Bernoulli(probability), obs=tosses)


def guide(tosses: Tensor) -> None:
    """Empty: there is no latent to infer."""


def log_likelihood(probability: Tensor | float, tosses: Tensor) -> Tensor:
    """log p(tosses) in nats as a function of the probability of heads, Σ x log p + (1 − x) log(1 − p).

    Args:
        probability: of heads, any shape; a whole curve at once.
        tosses: 0s and 1s, `(num_tosses,)`.

    Returns:
        In the shape of `probability`.

    Example:
        >>> tosses = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
        >>> curve = log_likelihood(torch.linspace(0.1, 0.9, 9), tosses)
        >>> int(curve.argmax())                                   # 0.4, the share of heads
        3
    """
    tosses, probability = _checked(tosses), torch.as_tensor(probability, dtype=torch.float64)
    heads, tails = tosses.sum(dtype=torch.float64), (1 - tosses).sum(dtype=torch.float64)
    return torch.xlogy(heads, probability) + torch.xlogy(tails, 1 - probability)


def maximum_likelihood(tosses: Tensor) -> float:
    """The probability of heads that makes the tosses most probable: the share of heads.

    Example:
        >>> maximum_likelihood(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]))
        0.4
    """
    return _checked(tosses).mean(dtype=torch.float64).item()


@dataclass(frozen=True)
class CoinFit:
    """What `fit` found.

    Attributes:
        probability: of heads.
        losses: −log p(tosses) in nats, one per step.
    """

    probability: float
    losses: list[float]


def fit(tosses: Tensor | Sequence[float], *, num_steps: int = 500, learning_rate: float = 0.05) -> CoinFit:
    """Maximum likelihood by gradient ascent: `pyro.infer.SVI` on `model` and the empty `guide`.

    Runs in a parameter store of its own, so that it neither sees nor changes the user's parameters.

    Args:
        tosses: 0s and 1s.
        num_steps: of Adam, on the logit of the probability.
        learning_rate: of the first step, falling to a hundredth of it.

    Returns:
        A `CoinFit`. Where all tosses fell alike the maximum lies at the edge, which steps on the logit approach but
        do not reach.

    Raises:
        ValueError: without tosses, or for anything but 0 and 1.

    Example:
        >>> tosses = torch.cat([torch.ones(400), torch.zeros(600)])
        >>> round(fit(tosses).probability, 3)
        0.4
    """
    tosses = _checked(torch.as_tensor(tosses))
    with pyro.get_param_store().scope():
        decay = 0.01 ** (1 / num_steps)
        optimizer = pyro.optim.ClippedAdam({"lr": learning_rate, "lrd": decay, "clip_norm": float("inf")})
        svi = SVI(model, guide, optimizer, Trace_ELBO())
        losses = [float(svi.step(tosses)) for _ in range(num_steps)]
        return CoinFit(pyro.param("probability").item(), losses)


class BetaBernoulli(nn.Module):
    """Coins with a prior: each coin's probability of heads is Beta(a, b), each coin is tossed the same number of times.

    A datum is one coin, a row of 0s and 1s. One latent per coin, neither Gaussian nor unconstrained, and yet
    log p(tosses) = log B(a + heads, b + tails) − log B(a, b) exactly (the tosses in their order: no binomial
    coefficient), with the exact posterior Beta(a + heads, b + tails).

    Args:
        a: pseudo-count of heads, positive.
        b: pseudo-count of tails, positive.

    Raises:
        ValueError: for a pseudo-count that is not positive.

    Example:
        >>> coin = BetaBernoulli(1.0, 1.0)
        >>> coin.log_px(torch.tensor([[1.0, 0.0]]))               # B(2, 2) = 1/6
        tensor([-1.7918], dtype=torch.float64)
    """

    def __init__(self, a: float = 1.0, b: float = 1.0) -> None:
        super().__init__()
        if not (a > 0 and b > 0):
            raise ValueError(f"The pseudo-counts a and b of a Beta prior must be positive; got {a!r} and {b!r}.")
        self.a, self.b = float(a), float(b)

    def posterior(self, tosses: Tensor) -> dist.TorchDistribution:
        """The exact p(probability given tosses), for tosses of shape `(num_coins, num_tosses)`."""
        return dist.Beta(self.a + tosses.sum(-1), self.b + (1 - tosses).sum(-1))

    def log_px(self, tosses: Tensor) -> Tensor:
        """The exact log p(tosses) in nats, per coin: `(num_coins, num_tosses)` to `(num_coins,)`."""
        tosses = _checked(tosses).double()
        return _log_beta(self.a + tosses.sum(-1), self.b + (1 - tosses).sum(-1)) - _log_beta(
            torch.tensor(self.a).double(), torch.tensor(self.b).double()
        )

    def model(self, tosses: Tensor) -> None:
        """The generative program."""
        a, b = tosses.new_tensor(self.a), tosses.new_tensor(self.b)
        with pyro.plate("data", len(tosses)):
            probability = pyro.sample("z", dist.Beta(a, b)).unsqueeze(-1)
            probability = probability.expand(*probability.shape[:-1], tosses.shape[-1])
            pyro.sample("x", dist.Bernoulli(probability).to_event(1), obs=tosses)

    def guide(self, tosses: Tensor) -> None:
        """The exact posterior as a guide."""
        with pyro.plate("data", len(tosses)):
            pyro.sample("z", self.posterior(tosses))


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _checked(tosses: Tensor) -> Tensor:
    if not isinstance(tosses, Tensor):
        raise TypeError(f"tosses must be a tensor of 0s and 1s; got {type(tosses).__name__}.")
    if tosses.numel() == 0:
        raise ValueError("There are no tosses; at least one is needed.")
    if not bool(((tosses == 0) | (tosses == 1)).all()):
        raise ValueError(f"A toss is 0 or 1; got values from {tosses.min():.4g} to {tosses.max():.4g}.")
    return tosses
