"""What the forgotten constant of the Bernoulli formula on grey images costs: the ELBO of MNIST as a density on [0, 1].

    python tests/benchmarks/continuous_bernoulli.py ROOT [--epochs 5] [--largest-logit inf]

ROOT holds MNIST/raw. The setting of Loaiza-Ganem & Cunningham (2019), https://arxiv.org/abs/1907.06845, as in their
notebook for MNIST: images dequantised to (level + u) / 256, 20 latent dimensions, two layers of 500 units, dropout of
0.1, Adam 1e-3, batch 50, outputs clipped as probabilities to [1e-4, 1 - 1e-4], which are logits up to 9.21. One VAE is
trained on the continuous Bernoulli density, one on the cross-entropy `bce_score`, which lacks its constant; both are
scored as continuous Bernoullis, on all 10,000 test images. Published: 1470 and 1139 nats, and 1416 where the outputs of
the second are taken as means and not as parameters. For how many epochs is not published. Measured after 5, which take
200 seconds of one core: 1447, 1123 and 1422, each ± 1 over other images.

What to see: the first is hundreds of nats above the second. Without a limit the first and the third are higher, since
a dark pixel, uniform on (0, 1/256), is worth up to log 512 - 1 = 5.2 nats, and with the limit 2.2.
"""

from __future__ import annotations

import argparse
import time
from math import log

import pyro
import torch
from torch import Tensor, nn

import ppl_vae as pv

LATENT_DIM = 20


def built(largest: float) -> pv.VAE:
    """A VAE with the continuous Bernoulli density and logits up to `largest`."""

    def network(num_in: int, num_out: int) -> nn.Sequential:
        hidden = [nn.Linear(num_in, 500), nn.ReLU(), nn.Dropout(0.1), nn.Linear(500, 500), nn.ReLU(), nn.Dropout(0.1)]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(500, num_out))

    likelihood = pv.likelihoods.ContinuousBernoulli()
    encoder = network(784, 2 * LATENT_DIM)
    decoder = nn.Sequential(network(LATENT_DIM, 784), nn.Hardtanh(-largest, largest))
    return pv.VAE((28, 28), LATENT_DIM, likelihood=likelihood, encoder=encoder, decoder=decoder)


class CrossEntropy(nn.Module):
    """The same program with the cross-entropy in the place of log p(x given z)."""

    def __init__(self, vae: pv.VAE) -> None:
        super().__init__()
        self.prior, self.decoder = vae.prior, vae.decoder

    def forward(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            logits = self.decoder(pyro.sample("z", self.prior())).reshape(x.shape)
            pyro.factor("score", pv.likelihoods.bce_score(logits, x, event_dim=2))


class AsMeans(nn.Module):
    """Logits up to `largest` of a continuous Bernoulli whose mean is the sigmoid of those of `decoder`.

    The mean is kept above that of the dequantised level 0, which is 1/512, and below that of 255.
    """

    def __init__(self, decoder: nn.Module, largest: float) -> None:
        super().__init__()
        self.decoder, self.largest = decoder, largest

    def forward(self, z: Tensor) -> Tensor:
        mean = self.decoder(z).double().sigmoid().clamp(1 / 512, 511 / 512)
        # It is ½ + ½ L(η / 2) with L(h) = coth h − 1/h, whose inverse is y (3 − y²) / (1 − y²) to 5 % (Cohen, 1991);
        # then by Newton's method.
        y = 2 * mean - 1
        eta = 2 * y * (3 - y**2) / (1 - y**2)
        for _ in range(5):
            p = pv.likelihoods.ContinuousBernoulli()(eta)
            eta = eta - (p.mean - mean) / p.variance
        return eta.clamp(-self.largest, self.largest).to(z.dtype)


def report(name: str, vae: pv.VAE, x: Tensor, scale: pv.data.Scale, seed: int) -> float:
    evidence = pv.importance_sampling(vae.model, vae.guide, x, num_samples=10, seed=seed)
    elbo, error = evidence.elbo.mean().item(), (evidence.elbo.std() / len(x) ** 0.5).item()
    bits = pv.bits_per_dim(evidence.elbo, vae.likelihood, x, scale=scale).mean().item()
    print(f"{name:<44}ELBO {elbo:8.1f} ± {error:.1f} nats,  bits/dim at most {bits:.3f}", flush=True)
    return elbo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--largest-logit", type=float, default=log((1 - 1e-4) / 1e-4))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    mnist = pv.data.load("mnist", root=options.root).dynamic_dequantization(seed=options.seed)
    elbos = []
    for name in ("continuous Bernoulli", "cross-entropy"):
        torch.manual_seed(options.seed)
        vae = built(options.largest_logit)
        model = vae.model if name == "continuous Bernoulli" else CrossEntropy(vae)
        began = time.process_time()
        history = pv.fit(
            model,
            vae.guide,
            mnist.train,
            epochs=options.epochs,
            batch_size=50,
            learning_rate=1e-3,
            seed=options.seed,
            progress=False,
        )
        losses = ", ".join(f"{loss:.1f}" for loss in history.loss)
        print(
            f"{name}: {options.epochs} epochs, {time.process_time() - began:.0f} s of CPU; losses {losses}", flush=True
        )
        elbos.append(report(f"{name}, outputs as parameters", vae, mnist.test, mnist.scale, options.seed))
    vae.model.decoder = AsMeans(vae.decoder, options.largest_logit)
    elbos.append(report("cross-entropy, outputs as means", vae, mnist.test, mnist.scale, options.seed))
    first, second, third = elbos
    print(f"the constant is worth {first - second:.1f} nats; with outputs as means {first - third:.1f}")


if __name__ == "__main__":
    main()
