"""Training and scoring the same networks under several likelihoods."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vae import files, isolation
from ppl_vae.comparing import pictures, rows
from ppl_vae.comparing.families import families, prepared
from ppl_vae.comparing.record import Comparison
from ppl_vae.comparing.rows import Row
from ppl_vae.data import Data, DynamicBinarization
from ppl_vae.data.dequantization import DynamicDequantization
from ppl_vae.diagnostics import diagnose, probability_integral_transform
from ppl_vae.evidence import importance_sampling
from ppl_vae.likelihoods import Likelihood
from ppl_vae.networks import MLP
from ppl_vae.posteriors import DiagonalNormal
from ppl_vae.training import fit
from ppl_vae.vae import VAE

Train = Tensor | DynamicBinarization | DynamicDequantization

# The learning rate decays to this part of itself.
LAST_RATE = 0.05
# Of the training data, held out to say when to stop.
HELD_OUT = 0.1


@dataclass(frozen=True)
class _Plan:
    """What is the same for all rows."""

    latent_dim: int
    hidden_dims: tuple[int, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    patience: int
    num_samples: int
    seed: int


def compare(
    data: Data,
    likelihoods: Mapping[str, Likelihood | tuple[Likelihood, Data]] | None = None,
    *,
    latent_dim: int = 10,
    hidden_dims: Sequence[int] = (256,),
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    patience: int = 10,
    num_samples: int = 1000,
    folder: str | PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Trains the same networks under several likelihoods on the same data, and scores them on the same test data.

    Encoder and decoder have the same widths and start from the same weights, but for the decoder's last layer, which
    gives as many numbers as the likelihood takes. Each likelihood is given the data on its own scale, see
    `comparing.prepared`. A tenth of the training data, the same for all, says when to stop: the weights are those of
    the epoch with the best ELBO on it. log p(x) is by `importance_sampling`, its parts by `diagnose`, and
    `diagnostics.probability_integral_transform` says whether the data look like draws of p(x given z).

    With a folder, each finished row is kept there and not trained again: a comparison that was interrupted goes on, and
    one with more likelihoods trains those only. Tables and pictures are written beside the rows.

    Args:
        data: as loaded, by `data.load`; with `dataclasses.replace`, parts of it.
        likelihoods: by name. In the place of a likelihood may be a pair of it and the data it is to be given, such as
            `(likelihoods.Gaussian(), data.dynamic_dequantization().logit_transform())`. All that have a place on these
            data by default, `comparing.families(data)`.
        latent_dim: length of z.
        hidden_dims: widths of the hidden layers of the encoder, and in reverse of the decoder.
        epochs: passes over the training data, at most.
        batch_size: of a step.
        learning_rate: of Adam, at first; it decays exponentially to a twentieth.
        patience: after how many epochs without a better ELBO to stop.
        num_samples: importance samples for each test datum.
        folder: where rows, tables (`comparison.json`) and pictures (`figures/`) are kept; nowhere if None.
        seed: of weights, batches and all draws.
        progress: show a bar.

    Returns:
        A `Comparison`. Print it for its tables; `.rows` hold the trained programs and all that is known of them.

    Raises:
        ValueError: for no likelihoods, or names that are the same as folders; for data that cannot be made what a
            likelihood scores; when the folder holds a row of another configuration. Nothing is trained then.
        RuntimeError: as `fit`; the rows before are kept.

    Example:
        >>> import ppl_vae as pv
        >>> digits = pv.data.load("digits")
        >>> two = {"Binomial": pv.likelihoods.Binomial(17), "Poisson": pv.likelihoods.Poisson()}
        >>> found = compare(digits, two, hidden_dims=(16,), epochs=2, num_samples=20, progress=False)
        >>> [(row.name, row.bits is None) for row in found.rows]
        [('Binomial', False), ('Poisson', True)]
    """
    plan = _Plan(latent_dim, tuple(hidden_dims), epochs, batch_size, learning_rate, patience, num_samples, seed)
    entries = _entries(data, likelihoods, seed)
    root = None if folder is None else Path(folder).expanduser()
    places = {name: None if root is None else root / "rows" / rows.folder_of(name) for name in entries}
    if root is not None and len({*places.values()}) < len(places):
        raise ValueError(f"Each row needs a folder of its own, and some of these names give the same: {list(entries)}.")
    programs = {name: _built(likelihood, some, plan) for name, (likelihood, some) in entries.items()}
    asked = {name: rows.configuration(programs[name], some, **asdict(plan)) for name, (_, some) in entries.items()}
    # All are looked at before any is trained.
    finished = {name for name, place in places.items() if place is not None and rows.is_finished(place, asked[name])}
    found, bar = [], tqdm(entries.items(), desc="compare", unit="row", disable=not progress or None)
    for name, (_, some) in bar:
        bar.set_postfix_str(name)
        place = places[name]
        if place is not None and name in finished:
            found.append(rows.read(name, place, programs[name], some))
            continue
        found.append(_row(name, programs[name], some, plan))
        if place is not None:
            rows.write(found[-1], place, asked[name])
    comparison = Comparison(found)
    if root is not None:
        files.write_json(root / "comparison.json", {"rows": comparison.numbers(), "notes": comparison.notes()})
        pictures.draw(comparison, root / "figures")
    return comparison


def _entries(
    data: Data, likelihoods: Mapping[str, Likelihood | tuple[Likelihood, Data]] | None, seed: int
) -> dict[str, tuple[Likelihood, Data]]:
    """Each likelihood as it was given, with its data."""
    if likelihoods is None:
        return families(data, seed=seed)
    if not likelihoods:
        raise ValueError("There is nothing to compare: give at least one likelihood.")
    return {
        name: value if isinstance(value, tuple) else (value, prepared(data, value, seed=seed))
        for name, value in likelihoods.items()
    }


def _built(likelihood: Likelihood, data: Data, plan: _Plan) -> VAE:
    shape, posterior = tuple(data.test.shape[1:]), DiagonalNormal()
    with isolation.seeded(plan.seed):
        encoder = MLP(shape, posterior.num_features(plan.latent_dim), hidden_dims=plan.hidden_dims)
        out_shape = (likelihood.num_parameters * shape[0], *shape[1:])
        decoder = MLP(plan.latent_dim, out_shape, hidden_dims=plan.hidden_dims[::-1])
    # A copy: training changes a likelihood's own parameters.
    return VAE(
        shape,
        plan.latent_dim,
        likelihood=copy.deepcopy(likelihood),
        posterior=posterior,
        encoder=encoder,
        decoder=decoder,
    )


def _row(name: str, vae: VAE, data: Data, plan: _Plan) -> Row:
    """A program trained and scored."""
    began, store = time.perf_counter(), pyro.get_param_store()
    train, held_out = _split(data.train, plan.seed)
    with store.scope(store.get_state()):
        history = fit(
            vae.model,
            vae.guide,
            train,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            learning_rate=lambda t: plan.learning_rate * LAST_RATE**t,
            validation=held_out,
            patience=plan.patience,
            seed=plan.seed,
            progress=False,
        )
    if history.stopped == "interrupted":
        raise KeyboardInterrupt
    programs = vae.model, vae.guide
    return Row(
        name,
        vae,
        data,
        importance_sampling(*programs, data.test, num_samples=plan.num_samples, seed=plan.seed),
        diagnose(*programs, data.test, seed=plan.seed),
        probability_integral_transform(*programs, data.test, seed=plan.seed),
        history,
        time.perf_counter() - began,
    )


def _split(train: Train, seed: int) -> tuple[Train, Tensor]:
    """Training data without a tenth of them, and that tenth, with what is drawn drawn once."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(HELD_OUT * len(train)))
    if isinstance(train, Tensor):
        return train[order[count:]], train[order[:count]]
    with isolation.seeded(seed):
        (held_out,) = train[order[:count]]
    rest = copy.copy(train)
    rest.tensors = tuple(tensor[order[count:]] for tensor in train.tensors)
    return rest, held_out
