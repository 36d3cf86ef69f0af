"""The one-layer architecture of Burda et al. (2016) on dynamically binarised MNIST: curve, test ELBO and log p(x).

    python tests/benchmarks/mnist_one_layer.py ROOT [--epochs 60]

ROOT holds MNIST/raw. Networks 784-200-200-50 and back, tanh, Bernoulli; batch 100; Adam from 1e-3 to 1e-4. Weights
start as in the authors' code: Glorot, and the decoder's last bias at the logit of the mean training image, without
which the first epochs go into learning that image.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import ppl_vae as pv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    mnist = pv.data.load("mnist", root=options.root).dynamic_binarization(seed=options.seed)
    encoder = pv.networks.MLP((28, 28), 100, hidden_dims=(200, 200), activation=nn.Tanh())
    decoder = pv.networks.MLP(50, (28, 28), hidden_dims=(200, 200), activation=nn.Tanh())
    for layer in (*encoder.layers, *decoder.layers):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    (grey,) = mnist.train.tensors
    with torch.no_grad():
        decoder.layers[-1].bias.copy_(grey.mean(0).clamp(0.001, 0.999).logit().flatten())
    vae = pv.VAE((28, 28), latent_dim=50, encoder=encoder, decoder=decoder)
    history = pv.fit(
        vae.model,
        vae.guide,
        mnist.train,
        validation=mnist.test,
        epochs=options.epochs,
        batch_size=100,
        learning_rate=lambda t: 1e-3 * 0.1**t,
        seed=options.seed,
    )
    print(f"training: {history.seconds:.0f} s")
    for epoch in sorted({1, 2, 5, 10, 20, 30, 40, 50, options.epochs}):
        if epoch <= options.epochs:
            train, test = -history.loss[epoch - 1], -history.validation[epoch - 1]
            print(f"epoch {epoch:3}: ELBO train {train:.2f}, test (10,000) {test:.2f} nats")

    index = torch.randperm(10_000, generator=torch.Generator().manual_seed(options.seed))[:1000]
    began = time.perf_counter()
    evidence = pv.importance_sampling(vae.model, vae.guide, mnist.test[index], num_samples=1000, seed=options.seed)
    print(f"log p(x) of 1,000 random test images: {time.perf_counter() - began:.0f} s")
    evidence.summary()


if __name__ == "__main__":
    main()
