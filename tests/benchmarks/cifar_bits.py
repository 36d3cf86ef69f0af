"""One currency: bits per dimension of CIFAR images under five likelihoods, with the same networks and training.

    python tests/benchmarks/cifar_bits.py ROOT [--epochs 3]

ROOT holds cifar10/cifar10_train_first4000.npz, of which 3,200 images train and 800 test. A small convolutional VAE of
32 latent dimensions; batch 8; Adam from 2e-3 to 2e-4. The numbers are upper bounds on bits, by importance sampling
with 5 samples; so few images and steps are far from published results, and only the order is of interest. The
categorical, with 786,432 numbers from the decoder for each image, takes most of the time.

Measured, each ± 0.014 over other images, which are the same for all:

    epochs  mixture  Gaussian in bins  logistic in bins  Gaussian dequantised  categorical
    3         7.330             7.486             7.540                 7.559        7.678
    10        7.006             7.095             7.132                 7.160

Why in this order: a mixture can have several peaks, or one peak and wide tails, where the others have one shape. The
Gaussian in bins and the dequantised one are of one family; bins give the probability of a level, and noise a lower
bound on it, the looser the fewer levels the density covers. A mixture of one component is the logistic, so the first
may not be above the third but for training; which of the Gaussian and the logistic is better is a matter of the tails
of the residuals. The categorical contains all of them but knows no order of levels: what one level teaches says nothing
of its neighbours, and so few images teach it least.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import ppl_vae as pv
from ppl_vae.data import Data
from ppl_vae.likelihoods import Categorical, DiscretisedGaussian, DiscretisedLogistic, Gaussian, LogisticMixture

SHAPE, LATENT_DIM = (3, 32, 32), 32


def row(name: str, likelihood: pv.likelihoods.Likelihood, data: Data, epochs: int, seed: int) -> str:
    """Trains, scores and gives a line of the table."""
    torch.manual_seed(seed)
    encoder = pv.networks.ConvEncoder(SHAPE, 2 * LATENT_DIM, channels=(16, 32))
    decoder = pv.networks.ConvDecoder(LATENT_DIM, SHAPE, num_parameters=likelihood.num_parameters, channels=(32, 8))
    vae = pv.VAE(SHAPE, LATENT_DIM, likelihood=likelihood, encoder=encoder, decoder=decoder)
    began = time.process_time()
    pv.fit(
        vae.model,
        vae.guide,
        data.train,
        epochs=epochs,
        batch_size=8,
        learning_rate=lambda t: 2e-3 * 0.1**t,
        seed=seed,
        progress=False,
    )
    evidence = pv.importance_sampling(vae.model, vae.guide, data.test, num_samples=5, seed=seed)
    bits = pv.bits_per_dim(evidence.log_px, likelihood, data.test, scale=data.scale)
    error = (bits.std() / len(bits) ** 0.5).item()
    seconds = time.process_time() - began
    return (
        f"{name:<34}{bits.mean().item():9.3f} ± {error:.3f}{evidence.mean:12.1f}   {likelihood.measure.name:<31}"
        f"{seconds:5.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    images = pv.data.load(options.root / "cifar10" / "cifar10_train_first4000.npz")
    levels, noisy = images.as_levels(), images.dynamic_dequantization(seed=options.seed)
    print(f"{'likelihood':<34}{'bits/dim':>17}{'log p(x)':>12}   {'of which measure':<31}{'CPU':>7}", flush=True)
    for name, likelihood, data in (
        ("mixture of 3 discretised logistics", LogisticMixture(3), levels),
        ("discretised logistic, per pixel", DiscretisedLogistic(per_pixel=True), levels),
        ("Gaussian in bins, per pixel", DiscretisedGaussian(per_pixel=True), levels),
        ("Gaussian, dequantised, per pixel", Gaussian(per_pixel=True), noisy),
        ("categorical", Categorical(256), levels),
    ):
        print(row(name, likelihood, data, options.epochs, options.seed), flush=True)


if __name__ == "__main__":
    main()
