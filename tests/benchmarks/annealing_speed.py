"""Gradients per second of annealing on a Pyro pair, against a loop written by hand in plain torch.

    python tests/benchmarks/annealing_speed.py [--rounds 5]

The network is 50-200-200-784, tanh, Bernoulli: the pair is `pv.VAE`'s, the loop computes the same log joint and its
gradient by matrix products alone, in the same Hamiltonian moves. Both run with as many threads as torch is given, by
turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae.evidence.annealing import Work
from ppl_vae.evidence.blocks import looked_at

CHAINS, DATA, TEMPERATURES, LEAPFROG = 16, 64, 10, 5


def by_hand(decoder: pv.networks.MLP, x: Tensor, loc: Tensor, scale: Tensor, step: Tensor) -> Tensor:
    """Annealing from N(loc, scale²) without Pyro: log weights `(chains, data)`."""
    layers = [(layer.weight, layer.bias) for layer in decoder.layers]
    flat = x.flatten(1)

    def densities(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = z.detach().requires_grad_()
        h = z
        for weight, bias in layers[:-1]:
            h = torch.tanh(nn.functional.linear(h, weight, bias))
        logits = nn.functional.linear(h, *layers[-1])
        log_lik = -nn.functional.binary_cross_entropy_with_logits(logits, flat.expand_as(logits), reduction="none").sum(
            -1
        )
        log_end = log_lik.double() - 0.5 * (z.square() + 1.8378770664).sum(-1).double()
        log_start = -(0.5 * ((z - loc) / scale).square() + scale.log() + 0.9189385332).sum(-1).double()
        (slope_end,) = torch.autograd.grad(log_end.sum(), z)
        return log_start.detach(), log_end.detach(), -(z.detach() - loc) / scale**2, slope_end

    z = loc + scale * torch.randn(CHAINS, *loc.shape)
    here = densities(z)
    log_w = torch.zeros(CHAINS, len(x), dtype=torch.float64)
    for t in range(1, TEMPERATURES + 1):
        beta = t / TEMPERATURES
        log_w = log_w + (here[1] - here[0]) / TEMPERATURES
        if t == TEMPERATURES:
            break
        p = first = torch.randn_like(z)
        new_z, new = z, here
        for _ in range(LEAPFROG):
            p = p + 0.5 * step * scale * ((1 - beta) * new[2] + beta * new[3])
            new_z = new_z + step * scale * p
            new = densities(new_z)
            p = p + 0.5 * step * scale * ((1 - beta) * new[2] + beta * new[3])
        rise = (1 - beta) * (new[0] - here[0]) + beta * (new[1] - here[1])
        yes = torch.rand(CHAINS, len(x)).log() < rise - 0.5 * (p.square() - first.square()).sum(-1)
        z = torch.where(yes.unsqueeze(-1), new_z, z)
        moved = zip(new, here, strict=True)
        here = tuple(torch.where(yes if a.dim() == 2 else yes.unsqueeze(-1), a, b) for a, b in moved)
    return log_w


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    decoder = pv.networks.MLP(50, (28, 28), hidden_dims=(200, 200), activation=nn.Tanh())
    encoder = pv.networks.MLP((28, 28), 100, hidden_dims=(200, 200), activation=nn.Tanh())
    vae = pv.VAE((28, 28), latent_dim=50, encoder=encoder, decoder=decoder)
    x = torch.bernoulli(torch.full((DATA, 28, 28), 0.3))
    work = Work(CHAINS, TEMPERATURES, LEAPFROG, pv.proposals.Guide())
    gradients = 1 + (TEMPERATURES - 1) * LEAPFROG
    rows = CHAINS * DATA
    with looked_at(vae.model, vae.guide, x) as pair, torch.no_grad():
        (block,) = work.blocks(pair, (x,))
        path, schedule = work.prepared(pair, block, root=0)
        q = vae.encode(x).base_dist

        def ours() -> Tensor:
            return path.forward(schedule, CHAINS)[0]

        def plain() -> Tensor:
            with torch.enable_grad():
                return by_hand(decoder, x, q.loc.detach(), q.scale.detach(), torch.tensor(0.3))

        seconds: dict[str, list[float]] = {"ppl_vae": [], "by hand": []}
        for _ in range(options.rounds + 1):
            for name, run in (("ppl_vae", ours), ("by hand", plain)):
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    rate = {name: gradients * rows / statistics.median(values[1:]) for name, values in seconds.items()}
    for name, value in rate.items():
        print(f"{name:<10}{value:>12,.0f} gradients of log p(x, z) per second ({rows} rows at once)")
    print(f"ratio     {rate['ppl_vae'] / rate['by hand']:>12.2f}    {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
