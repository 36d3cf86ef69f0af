"""The contestants of the benchmarks: one VAE, trained and scored by this package, by Pyro and by plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ppl_vae as pv
from ppl_vae.batches import Batches
from ppl_vae.precision import fast_and_exact
from ppl_vae.training.steps import Trained

PIXELS, HIDDEN, LATENT, BATCH = 784, (400, 400), 50, 128
SAMPLES, CHUNKS = 1000, (10, 100, 1000)
DECODER_FLOPS = 2 * (LATENT * HIDDEN[0] + HIDDEN[0] * HIDDEN[1] + HIDDEN[1] * PIXELS)  # per sample


def images(num_data: int) -> Tensor:
    return (torch.rand(num_data, PIXELS, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def networks(latent_dim: int = LATENT) -> tuple[nn.Module, nn.Module]:
    encoder = pv.networks.MLP(PIXELS, 2 * latent_dim, hidden_dims=HIDDEN)
    return encoder, pv.networks.MLP(latent_dim, PIXELS, hidden_dims=HIDDEN)


def vae(latent_dim: int = LATENT) -> pv.VAE:
    encoder, decoder = networks(latent_dim)
    return pv.VAE(PIXELS, latent_dim, encoder=encoder, decoder=decoder)


class Plain:
    """The same VAE as a user of Pyro writes it, and as one of PyTorch does."""

    def __init__(self) -> None:
        self.encoder, self.decoder = networks()

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.encoder(x).chunk(2, -1)
        return loc, nn.functional.softplus(raw) + 1e-6

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.posterior(x)).to_event(1))

    def loss(self, x: Tensor) -> Tensor:
        loc, scale = self.posterior(x)
        logits = self.decoder(loc + scale * torch.randn_like(scale))
        kl = -0.5 * (1 + 2 * scale.log() - loc.square() - scale.square()).sum()
        return nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def step_of_fit(pair: Any, x: Tensor, *, batch_size: int = BATCH, compile: bool) -> float:
    """Seconds from the first step of the second epoch of `fit` to its return, for each step."""
    starts: list[float] = []

    def rate(_: float) -> float:
        starts.append(time.perf_counter())
        return 1e-3

    pv.fit(
        pair.model, pair.guide, x, epochs=2, batch_size=batch_size, learning_rate=rate, compile=compile, progress=False
    )
    steps = len(starts) // 2  # the first rate is that of the optimiser as it is made
    return (time.perf_counter() - starts[1 + steps]) / steps


def trainers(x: Tensor) -> dict[str, Callable[[], float]]:
    """Seconds of a step in one epoch, by contestant."""
    ours, plain = vae(), Plain()
    loader = DataLoader(TensorDataset(x), batch_size=BATCH, shuffle=True)
    svi = SVI(plain.model, plain.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    def by_pyro() -> float:
        return seconds(lambda: [svi.step(batch) for (batch,) in loader]) / len(loader)

    def by_hand(*, compiled: str | None) -> Callable[[], float]:
        pair = Plain()
        weights = [*pair.encoder.parameters(), *pair.decoder.parameters()]
        adam = torch.optim.Adam(weights, 1e-3, fused=compiled is not None)
        loss = pair.loss if compiled is None else torch.compile(pair.loss)

        def epoch() -> None:
            indices = torch.randperm(len(x)).split(BATCH)
            for batch in (x[index] for index in indices) if compiled else (batch for (batch,) in loader):
                adam.zero_grad()
                loss(batch).backward()
                adam.step()

        def timed() -> float:
            with matmul_precision(compiled or "highest"):
                return seconds(epoch) / len(loader)

        return timed

    trained = Trained(plain.model, plain.guide, Trace_ELBO(), Batches((x,), BATCH), compile=True)
    graph, update = trained.graph, trained.graph and trained.graph.update
    assert graph is not None
    assert update is not None
    with pyro.validation_enabled(False):
        trained.step((x[:BATCH],), "the first step")

    def bare() -> None:
        for index in torch.randperm(len(x)).split(BATCH):
            graph.compiled(x.index_select(0, index), update.factors())

    def by_graph() -> float:
        with fast_and_exact():
            return seconds(bare) / len(loader)

    return {
        "fit(compile=True)": lambda: step_of_fit(ours, x, compile=True),
        "fit(compile=True) of a pair in plain Pyro": lambda: step_of_fit(plain, x, compile=True),
        "the graph of that step alone": by_graph,
        "fit": lambda: step_of_fit(ours, x, compile=False),
        "Pyro: SVI, DataLoader": by_pyro,
        "PyTorch: DataLoader": by_hand(compiled=None),
        "PyTorch: compiled, indexed": by_hand(compiled="highest"),
        "PyTorch: compiled, indexed, 'medium'": by_hand(compiled="medium"),
    }


def samplers(x: Tensor) -> dict[str, Callable[[], float]]:
    """Seconds of a sample, by contestant: of Pyro's on few of the data, for it scores all of a batch at once."""
    ours, plain, few = vae(), Plain(), x[:64]

    def importance(pair: Any, *, compile: bool) -> float:
        def run() -> None:
            pv.importance_sampling(pair.model, pair.guide, x, num_samples=SAMPLES, compile=compile)

        return seconds(run) / (len(x) * SAMPLES)

    @torch.no_grad()
    def by_pyro(chunk: int) -> float:
        def run() -> None:
            for _ in range(SAMPLES // chunk):
                vectorized_importance_weights(
                    plain.model, plain.guide, few, num_samples=chunk, max_plate_nesting=1, normalized=False
                )

        return seconds(run) / (len(few) * SAMPLES)

    return {
        "importance_sampling(compile=True)": lambda: importance(ours, compile=True),
        "importance_sampling(compile=True) of a pair in plain Pyro": lambda: importance(plain, compile=True),
        "importance_sampling": lambda: importance(ours, compile=False),
        **{f"Pyro: vectorized_importance_weights, chunks of {c}": partial(by_pyro, c) for c in CHUNKS},
    }


def annealers(x: Tensor) -> dict[str, Callable[[], float]]:
    """Seconds of a gradient of log p(x, z) in annealed importance sampling, and of the same by hand, by contestant."""
    ours, plain = vae(), Plain()
    chains, temperatures, leapfrog = 8, 10, 5
    gradients = chains * len(x) * (1 + (temperatures - 1) * leapfrog)

    def annealed(*, compile: bool) -> float:
        def run() -> None:
            pv.annealed_importance_sampling(
                ours.model,
                ours.guide,
                x,
                num_chains=chains,
                num_temperatures=temperatures,
                num_leapfrog=leapfrog,
                compile=compile,
            )

        return seconds(run) / gradients

    def by_hand() -> float:
        """Only the gradients, without moves: what a loop in PyTorch could not do without."""

        def gradient(z: Tensor) -> Tensor:
            z = z.requires_grad_()
            logits = plain.decoder(z)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="sum")
            return torch.autograd.grad(loss + 0.5 * z.square().sum(), z)[0]

        noise = torch.randn(chains, len(x), LATENT)
        return seconds(lambda: [gradient(noise.clone()) for _ in range(gradients // (chains * len(x)))]) / gradients

    return {
        "annealed_importance_sampling(compile=True)": lambda: annealed(compile=True),
        "annealed_importance_sampling": lambda: annealed(compile=False),
        "PyTorch: the gradients alone": by_hand,
    }


def gemm_rate() -> float:
    """The best rate of a product of matrices, in FLOP per second."""

    def rate(m: int, k: int, n: int, name: str) -> float:
        a, b = torch.randn(m, k), torch.randn(n, k)
        with matmul_precision(name):
            return 2 * m * k * n / min(seconds(lambda: a @ b.T) for _ in range(10))

    shapes = ((1000, 400, 784), (2048, 2048, 2048))
    return max(rate(*shape, name) for shape in shapes for name in ("highest", "medium"))
