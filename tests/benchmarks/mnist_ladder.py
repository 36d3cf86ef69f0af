"""The ladder ELBO → IWAE → annealing → upper bound on MNIST, for a Bernoulli and for a Gaussian decoder.

    python tests/benchmarks/mnist_ladder.py ROOT [--epochs 60] [--num-data 200] [--temperatures 100] [--out FOLDER]

ROOT holds binarized_mnist/binarized_mnist.npz, the static binarisation of Larochelle & Murray (2011), and MNIST/raw.
Networks 784-200-200-50 and back, tanh, batch 100, Adam from 1e-3 to 1e-4, started as in Burda et al. (2016). The test
images are drawn at random: the static set's are sorted by class.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

import ppl_vae as pv

matplotlib.use("agg")


def built(likelihood: pv.likelihoods.Likelihood, mean: Tensor) -> pv.VAE:
    encoder = pv.networks.MLP((28, 28), 100, hidden_dims=(200, 200), activation=nn.Tanh())
    decoder = pv.networks.MLP(50, (28, 28), hidden_dims=(200, 200), activation=nn.Tanh())
    for layer in (*encoder.layers, *decoder.layers):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        bernoulli = isinstance(likelihood, pv.likelihoods.Bernoulli)
        decoder.layers[-1].bias.copy_((mean.clamp(0.001, 0.999).logit() if bernoulli else mean).flatten())
    return pv.VAE((28, 28), latent_dim=50, likelihood=likelihood, encoder=encoder, decoder=decoder)


def trained(name: str, likelihood: pv.likelihoods.Likelihood, train: Tensor, epochs: int, seed: int) -> pv.VAE:
    torch.manual_seed(seed)
    vae = built(likelihood, train.mean(0))
    history = pv.fit(
        vae.model,
        vae.guide,
        train,
        epochs=epochs,
        batch_size=100,
        learning_rate=lambda t: 1e-3 * 0.1**t,
        seed=seed,
        progress=False,
    )
    print(f"\n=== {name}: {epochs} epochs in {history.seconds:.0f} s, training loss {history.loss[-1]:.2f}", flush=True)
    return vae


def ladder(vae: pv.VAE, x: Tensor, temperatures: int, seed: int, picture: Path | None) -> None:
    """Prints means over the images, with their standard errors for the same images and other samples."""
    began = time.perf_counter()
    rungs: dict[str, tuple[float, float]] = {}
    for k in (10, 100, 5000):
        evidence = pv.importance_sampling(vae.model, vae.guide, x, num_samples=k, seed=seed)
        rungs[f"IWAE {k}"] = evidence.mean, evidence.mc_standard_error
    evidence.summary()
    print(f"    {time.perf_counter() - began:.0f} s so far", flush=True)
    rungs = {"ELBO": (evidence.elbo.mean().item(), float("nan")), **rungs}
    anneal = partial(pv.annealed_importance_sampling, num_temperatures=temperatures)
    found = pv.bounds(vae.model, vae.guide, x, estimators=[anneal], seed=seed)
    found.summary()
    assert found.modes is not None
    found.modes.summary()
    rungs["annealed"] = found.mean["lower"], found.mc_standard_error["lower"]
    rungs["upper"] = found.mean["upper"], found.mc_standard_error["upper"]
    pv.sandwich(vae.model, vae.guide, num_data=len(x), num_temperatures=temperatures, seed=seed).summary()
    for name, (value, error) in rungs.items():
        print(f"{name:<12}{value:>10.3f} ± {error:.3f}")
    above = (found.lower > evidence.log_px).double().mean().item()
    print(
        f"annealed above IWAE 5000 for {100 * above:.0f} % of the images; ladder in {time.perf_counter() - began:.0f} s"
    )
    if picture is not None:
        values, errors = zip(*rungs.values(), strict=True)
        sides = ["lower"] * (len(rungs) - 1) + ["upper"]
        ax = pv.plots.ladder(list(rungs), values, errors, sides=sides)
        ax.get_figure().savefig(picture, dpi=160, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--num-data", type=int, default=200)
    parser.add_argument("--temperatures", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for pictures of the two ladders")
    options = parser.parse_args()

    static = np.load(Path(options.root, "binarized_mnist", "binarized_mnist.npz"))
    train, test = (torch.from_numpy(static[part]).float().reshape(-1, 28, 28) for part in ("train", "test"))
    index = torch.randperm(len(test), generator=torch.Generator().manual_seed(options.seed))[: options.num_data]
    vae = trained("Bernoulli", pv.likelihoods.Bernoulli(), train, options.epochs, options.seed)
    ladder(vae, test[index], options.temperatures, options.seed, options.out and options.out / "bernoulli.png")

    grey = pv.data.load("mnist", root=options.root)
    gaussian = pv.likelihoods.Gaussian(scale=0.05)
    index = torch.randperm(len(grey.test), generator=torch.Generator().manual_seed(options.seed))[: options.num_data]
    vae = trained(
        "Gaussian, scale 0.05", gaussian, torch.as_tensor(grey.train), max(1, options.epochs // 3), options.seed
    )
    ladder(vae, grey.test[index], options.temperatures, options.seed, options.out and options.out / "gaussian.png")


if __name__ == "__main__":
    main()
