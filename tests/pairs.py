"""The linear-Gaussian pair in every form a user might write it, for the tests of everything that takes a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from ppl_vae.linear_gaussian import LinearGaussian, LinearGaussianGuide

# Sizes that are all different primes, so that no dimension can be taken for another.
NUM_DATA, LATENT_DIM, DATA_DIM = 11, 3, 7


def linear_gaussian(latent_dim: int = LATENT_DIM, data_dim: int = DATA_DIM, noise: float = 0.6) -> LinearGaussian:
    g = torch.Generator().manual_seed(3)
    w = torch.randn(data_dim, latent_dim, generator=g, dtype=torch.float64)
    return LinearGaussian(w, mean=torch.randn(data_dim, generator=g, dtype=torch.float64), noise=noise)


def simulated(lg: LinearGaussian, num_data: int = NUM_DATA) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return lg.model(num_data=num_data)


def prior(lg: LinearGaussian) -> dist.Distribution:
    return dist.Normal(torch.zeros(lg.w.shape[1]).to(lg.w), 1.0).to_event(1)


def conditional(lg: LinearGaussian, z: Tensor) -> dist.Distribution:
    return dist.Normal(z @ lg.w.T + lg.mean, lg.noise)


# Each form takes the model's constants and a function from x to q(z given x), and gives a model and a guide.
Q = Callable[[Tensor], dist.Distribution]


def as_modules(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior(lg))
                pyro.sample("x", conditional(lg, z).to_event(1), obs=x)

    class Guide(nn.Module):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", q(x))

    return Model(), Guide()


def as_bound_methods(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    class Both:
        def __init__(self) -> None:
            self.decoder = nn.Linear(lg.w.shape[1], lg.w.shape[0]).double()
            self.decoder.weight.data = lg.w
            self.decoder.bias.data = lg.mean

        def model(self, x: Tensor) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior(lg))
                pyro.sample("x", dist.Normal(self.decoder(z), lg.noise).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", q(x))

    both = Both()
    return both.model, both.guide


def as_functions(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    model, guide = as_modules(lg, q)
    return lambda x: model(x), lambda x: guide(x)


def with_another_plate_name(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    def model(x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", prior(lg))
            pyro.sample("x", conditional(lg, z).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z", q(x))

    return model, guide


def with_plate_without_size(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    """A plate that is not told how many data there are, as in examples of Pyro."""

    def model(x: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", prior(lg).expand([len(x)]))
            pyro.sample("x", conditional(lg, z).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data"):
            pyro.sample("z", q(x))

    return model, guide


def with_subsampled_plate(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 10 * len(x), subsample_size=len(x)):
            z = pyro.sample("z", prior(lg))
            pyro.sample("x", conditional(lg, z).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 10 * len(x), subsample_size=len(x)):
            pyro.sample("z", q(x))

    return model, guide


def with_pixel_plate(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    """Data at dimension −2, pixels in a plate of their own at −1."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", prior(lg).expand([1]))
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", conditional(lg, z.squeeze(-2)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", q(x.unsqueeze(-2)))

    return model, guide


def with_outer_pixel_plate(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    """Data at dimension −1, pixels at −2: `x` transposed."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior(lg))
            with pyro.plate("pixels", x.shape[1], dim=-2):
                p = conditional(lg, z.squeeze(-3) if z.dim() > 2 else z)
                loc = p.loc.transpose(-1, -2)
                pyro.sample("x", dist.Normal(loc, lg.noise.unsqueeze(-1)), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", q(x))

    return model, guide


def with_fixed_plate(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    """A plate of a number fixed beforehand, as in a notebook: runs on all the data or not at all."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", NUM_DATA):
            z = pyro.sample("z", prior(lg))
            pyro.sample("x", conditional(lg, z).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", NUM_DATA):
            pyro.sample("z", q(x))

    return model, guide


def one_sample_at_a_time(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    """A decoder that takes one leading dimension of exactly the batch's length: neither particles nor tiles."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(lg))
            if z.dim() != 2 or len(z) not in (3, 6, NUM_DATA):
                raise ValueError("one batch at a time")
            pyro.sample("x", conditional(lg, z).to_event(1), obs=x)

    return model, as_functions(lg, q)[1]


def with_two_dimensional_decoder(lg: LinearGaussian, q: Q) -> tuple[Any, Any]:
    """A decoder that refuses more than one leading dimension, as a convolution does: scored by tiling."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(lg))
            if z.dim() != 2:
                raise RuntimeError("Expected a batch of vectors")
            pyro.sample("x", conditional(lg, z).to_event(1), obs=x)

    return model, as_functions(lg, q)[1]


FORMS: dict[str, Callable[[LinearGaussian, Q], tuple[Any, Any]]] = {
    form.__name__: form
    for form in (
        as_modules,
        as_bound_methods,
        as_functions,
        with_another_plate_name,
        with_plate_without_size,
        with_subsampled_plate,
        with_pixel_plate,
        with_outer_pixel_plate,
        with_fixed_plate,
        with_two_dimensional_decoder,
        one_sample_at_a_time,
    )
}


class Repeatable(dist.Normal):
    """Draws that follow from their mean and their number, so that a datum has the same in any batch."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        loc = self.loc.expand(self._extended_shape(sample_shape))
        number = torch.arange(1.0, 1 + loc.shape[0]).reshape(-1, *(1,) * (loc.dim() - 1)).to(loc)
        noise = 2.1 * torch.sin(3.7 * number * number + 50.0 * loc.detach() + number)
        return loc + self.scale * noise


def repeatable(lg: LinearGaussian) -> Q:
    """The perturbed guide with such draws."""

    def q(x: Tensor) -> dist.Distribution:
        base = lg.perturbed_guide().q(x).base_dist
        return Repeatable(base.loc, base.scale).to_event(1)

    return q


def auto_normal(lg: LinearGaussian, guide: LinearGaussianGuide, x: Tensor) -> tuple[Any, AutoNormal]:
    """The pair with an `AutoNormal` whose parameters are those of `guide` at x."""
    model = as_functions(lg, guide.q)[0]
    auto = AutoNormal(model)
    auto(x)
    q = guide.q(x).base_dist
    with torch.no_grad():
        auto.locs.z = q.loc
        auto.scales.z = q.scale.expand_as(q.loc).clone()
    return model, auto
