"""Pairs of one and of two layers of latents whose parameters come with the data, a row of them for each datum.

The same datum repeated is then as many replicates of a gradient from one pass.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

THETA = torch.tensor([0.9, 1.3, -0.2], dtype=torch.float64)
PHI = torch.tensor([0.5, 0.1, -0.4, 1.4, 0.9, -0.2], dtype=torch.float64)


def two_layers(x: Tensor, theta: Tensor, phi: Tensor) -> None:
    """z2 ~ N(0, 1), z1 given z2, x given z1; written in the order of the guide."""
    a, b, c = theta.unbind(-1)
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
        z1 = pyro.sample("z1", dist.Normal(a * z2 + c, 0.8))
        pyro.sample("x", dist.Normal(b * torch.sin(z1) + z1, 0.5), obs=x)


def two_layer_guide(x: Tensor, theta: Tensor, phi: Tensor) -> None:
    """z1 given x, then z2 given z1 and x."""
    a, b, s1, c, d, s2 = phi.unbind(-1)
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(a * x + b, s1.exp()))
        pyro.sample("z2", dist.Normal(c * z1 + d * x, s2.exp()))


def one_layer(x: Tensor, theta: Tensor, phi: Tensor) -> None:
    a, b, c = theta.unbind(-1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(b * torch.sin(z) + a * z, 0.5), obs=x)


def one_layer_guide(x: Tensor, theta: Tensor, phi: Tensor) -> None:
    a, b, s, *_ = phi.unbind(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x + b, s.exp()))


PAIRS = {"one layer": (one_layer, one_layer_guide), "two layers": (two_layers, two_layer_guide)}
