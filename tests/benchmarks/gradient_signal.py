"""The signal in the encoder's gradient as the number of particles K grows: IWAE's is lost, DReG's is not.

    python tests/benchmarks/gradient_signal.py [--replicates 2000] [--distance 0.1]

The setting of Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018
(https://arxiv.org/abs/1802.04537), section 4: z ~ N(0, I) in 20 dimensions, x given z ~ N(z, I), a guide
N(A x + b, 2/3 I) at A = I / 2 and b = 0, both moved by N(0, distance²). Printed are

- the mean over the entries of b of |mean| / standard deviation of the gradient over replicates;
- the variance relative to IWAE's, and the largest distance of the two means in standard errors;
- the slope of the first in K on a double logarithmic scale: -1/2 for IWAE and +1/2 for DReG for many particles.
"""

from __future__ import annotations

import argparse
from math import pi
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import ppl_vae as pv

DIM = 20


def model(x: Tensor, gain: Tensor, offset: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x: Tensor, gain: Tensor, offset: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(gain * x + offset, (2 / 3) ** 0.5).to_event(1))


def gradients(objective: Any, x: Tensor, gain: Tensor, offset: Tensor, replicates: int) -> Tensor:
    """The gradient of the bound by the offset, `(replicates, DIM)`: every replicate has a row of its own."""
    rows = offset.repeat(replicates, 1).requires_grad_()
    objective.differentiable_loss(model, guide, x.expand(replicates, -1), gain.expand(replicates, -1), rows).backward()
    assert rows.grad is not None
    return -rows.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--distance", type=float, default=0.1)
    options = parser.parse_args()
    replicates = options.replicates
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = 2**0.5 * torch.randn(DIM, dtype=torch.float64)
    gain = 0.5 + options.distance * torch.randn(DIM, dtype=torch.float64)
    offset = options.distance * torch.randn(DIM, dtype=torch.float64)
    particles = (1, 4, 16, 64, 256)
    kinds = {"IWAE": pv.IWAE, "DReG": pv.DReG}
    found = {
        (name, k): gradients(kind(num_particles=k), x, gain, offset, replicates)
        for k in particles
        for name, kind in kinds.items()
    }
    print(f"{'K':>6}" + "".join(f"{name + ' SNR':>12}" for name in kinds) + f"{'var DReG/IWAE':>16}{'apart':>8}")
    signal: dict[str, list[float]] = {name: [] for name in kinds}
    for k in particles:
        for name in kinds:
            signal[name].append((found[name, k].mean(0).abs() / found[name, k].std(0)).mean().item())
        iwae, dreg = found["IWAE", k], found["DReG", k]
        error = ((iwae.var(0) + dreg.var(0)) / replicates).sqrt()
        apart = ((iwae.mean(0) - dreg.mean(0)).abs() / error).max()
        ratio = (dreg.var(0) / iwae.var(0)).mean()
        print(f"{k:>6}" + "".join(f"{signal[name][-1]:>12.4f}" for name in kinds) + f"{ratio:>16.2e}{apart:>8.1f}")
    log_k = torch.tensor(particles).double().log()
    for name, values in signal.items():
        y = torch.tensor(values).double().log()
        slope = ((log_k - log_k.mean()) * (y - y.mean())).sum() / (log_k - log_k.mean()).square().sum()
        print(f"{name}: SNR ~ K^{slope:+.2f}")
    print(f"No signal at all would show as an SNR of {(2 / pi / replicates) ** 0.5:.4f}.")


if __name__ == "__main__":
    main()
