"""What richer priors and posteriors are worth on dynamically binarised MNIST, at equal steps and on equal batches.

    python tests/benchmarks/priors_and_posteriors.py train ROOT FOLDER NAME ... [--epochs 35]
    python tests/benchmarks/priors_and_posteriors.py guides ROOT FOLDER NAME ... [--epochs 3]
    python tests/benchmarks/priors_and_posteriors.py compare ROOT FOLDER NAME ... [--num-data 1000] [--num-gaps 100]

ROOT holds MNIST/raw; FOLDER takes the weights, and training goes on from those that are there. NAME is one or more of
those of `CHOICES`: `standard` is the usual VAE, the others change its prior or its posterior and nothing else. Networks
784-200-200-40 and back, tanh, batch 100, Adam from 1e-3 to 1e-4, started as in `ppl-vae reproduce`. The comparison is
of held-out log p(x) by importance sampling and of KL(q, posterior) = log p(x) - ELBO, on the same random test images,
as differences from the first NAME. As the models differ, too, `guides` trains new guides of each NAME to the one model
of FOLDER/standard.safetensors, where differences of the ELBO are differences of the KL. `compare` ends, on a few
images, with the gaps of three families fitted to each.
"""

from __future__ import annotations

import argparse
import time
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor, nn

import ppl_vae as pv

LATENT_DIM = 40
# name: the prior and the posterior
CHOICES = {
    "standard": lambda: (None, None),
    "mixture": lambda: (pv.priors.GaussianMixture(LATENT_DIM, 500), None),
    "vamp": lambda: (pv.priors.VampPrior(500), None),
    "flow_prior": lambda: (pv.priors.FlowPrior(LATENT_DIM), None),
    "full": lambda: (None, pv.posteriors.FullCovarianceNormal()),
    "flow": lambda: (None, pv.posteriors.CouplingFlow(LATENT_DIM)),
    "flow_both": lambda: (pv.priors.FlowPrior(LATENT_DIM), pv.posteriors.CouplingFlow(LATENT_DIM)),
}


def built(name: str, grey: Tensor) -> pv.VAE:
    prior, posterior = CHOICES[name]()
    num_features = (posterior or pv.posteriors.DiagonalNormal()).num_features(LATENT_DIM)
    encoder = pv.networks.MLP((28, 28), num_features, hidden_dims=(200, 200), activation=nn.Tanh())
    decoder = pv.networks.MLP(LATENT_DIM, (28, 28), hidden_dims=(200, 200), activation=nn.Tanh())
    for layer in (*encoder.layers, *decoder.layers):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        decoder.layers[-1].bias.copy_(grey.mean(0).clamp(0.001, 0.999).logit().flatten())
    vae = pv.VAE((28, 28), LATENT_DIM, prior=prior, posterior=posterior, encoder=encoder, decoder=decoder)
    if isinstance(vae.prior, pv.priors.VampPrior):
        vae.prior.start_from(grey[torch.randperm(len(grey))[: vae.prior.num_pseudo_inputs]])
    return vae


def train(name: str, mnist: pv.data.Data, folder: Path, epochs: int, seed: int) -> None:
    torch.manual_seed(seed)
    (grey,) = mnist.train.tensors
    path = folder / f"{name}.safetensors"
    vae = pv.load(path) if path.exists() else built(name, grey)
    began = time.process_time()
    history = pv.fit(
        vae.model,
        vae.guide,
        mnist.train,
        epochs=epochs,
        batch_size=100,
        learning_rate=lambda t: 1e-3 * 0.1**t,
        seed=seed,
        progress=False,
    )
    seconds = time.process_time() - began
    curve = ", ".join(f"{-loss:.2f}" for loss in history.loss)
    print(f"{name}: {epochs} epochs, {seconds:.0f} CPU seconds; training ELBO of each epoch {curve}", flush=True)
    pv.save(vae, path)


def guides(names: list[str], mnist: pv.data.Data, folder: Path, num_data: int, epochs: int, seed: int) -> None:
    model = pv.load(folder / "standard.safetensors").model.requires_grad_(False)
    index = torch.randperm(10_000, generator=torch.Generator().manual_seed(seed))[:num_data]
    first = None
    for name in names:
        torch.manual_seed(seed)
        guide = built(name, mnist.train.tensors[0]).guide
        began = time.process_time()
        rate = {"batch_size": 100, "learning_rate": lambda t: 1e-3 * 0.1**t}
        pv.fit(model, guide, mnist.train, epochs=epochs, seed=seed, progress=False, **rate)
        seconds = time.process_time() - began
        elbo = pv.importance_sampling(model, guide, mnist.test[index], num_samples=300, seed=seed).elbo
        first = elbo if first is None else first
        gain, error = (elbo - first).mean(), (elbo - first).std() / sqrt(num_data)
        print(f"{name:12} ELBO {elbo.mean():9.3f}, KL {-gain:+.3f} ± {error:.3f}, {seconds:.0f} CPU s", flush=True)


def compare(names: list[str], mnist: pv.data.Data, folder: Path, num_data: int, num_gaps: int, seed: int) -> None:
    index = torch.randperm(10_000, generator=torch.Generator().manual_seed(seed))[:num_data]
    x = mnist.test[index]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        vae = pv.load(folder / f"{name}.safetensors")
        began = time.process_time()
        evidence = pv.importance_sampling(vae.model, vae.guide, x, num_samples=2000, seed=seed)
        found[name] = evidence.log_px, evidence.log_px - evidence.elbo
        cells = []
        for values, first in zip(found[name], found[names[0]], strict=True):
            difference = values - first
            cells.append(f"{values.mean():9.3f} {difference.mean():+8.3f} ± {difference.std() / sqrt(num_data):.3f}")
        print(
            f"{name:12} log p(x) {cells[0]}   KL {cells[1]}   Pareto k > 0.7: {(evidence.pareto_k > 0.7).sum():4} of "
            f"{num_data}, {time.process_time() - began:.0f} CPU s",
            flush=True,
        )
    if not num_gaps:
        return
    x = x[:num_gaps]
    for name in names:
        vae = pv.load(folder / f"{name}.safetensors")
        log_px = pv.annealed_importance_sampling(vae.model, vae.guide, x, seed=seed)
        for family in (pv.proposals.DiagonalNormal(), pv.proposals.FullCovarianceNormal(), pv.proposals.CouplingFlow()):
            began = time.process_time()
            gaps = pv.inference_gaps(vae.model, vae.guide, x, family=family, num_samples=500, log_px=log_px, seed=seed)
            print(f"\n{name}, {time.process_time() - began:.0f} CPU s")
            gaps.summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "guides", "compare"])
    parser.add_argument("root")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=list(CHOICES))
    parser.add_argument("--epochs", type=int, default=35)
    parser.add_argument("--num-data", type=int, default=1000)
    parser.add_argument("--num-gaps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mnist = pv.data.load("mnist", root=options.root).dynamic_binarization(seed=options.seed)
    if options.what == "compare":
        compare(options.names, mnist, options.folder, options.num_data, options.num_gaps, options.seed)
    if options.what == "guides":
        guides(options.names, mnist, options.folder, options.num_data, options.epochs, options.seed)
    for name in options.names if options.what == "train" else ():
        train(name, mnist, options.folder, options.epochs, options.seed)


if __name__ == "__main__":
    main()
