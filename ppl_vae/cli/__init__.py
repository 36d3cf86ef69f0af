"""`ppl-vae`: the package from a terminal. Each command reads its options and calls the rooms.

What is slow to import (torch above all) is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Variational autoencoders as probabilistic programs, with a log p(x) that can be trusted.",
    epilog="Begin with: ppl-vae demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DataName = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="digits, mnist, fashion-mnist, kmnist, cifar10; or the path of an .npy or .npz file or of a folder of "
        "images.",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(help="Where named data sets lie. Default: $PPL_VAE_DATA, else ~/.cache/ppl-vae.", show_default=False),
]
Download = Annotated[bool, typer.Option("--download", help="Download a named data set that is not there.")]
Seed = Annotated[int, typer.Option(help="Of every random number.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile what is run again and again; needs a C++ compiler, and pays if long.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A folder written by train or demo.")]


def main() -> None:
    """Runs the command line; what the library refuses becomes one sentence and exit code 2."""
    try:
        with _joined():
            app()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        said = str(error).split("\nTrace Shapes")[0]  # which Pyro adds for those who know the program
        typer.echo(f"ppl-vae: {' '.join(said.split())}", err=True)
        sys.exit(2)


def _joined() -> AbstractContextManager[None]:
    """The processes that `torchrun` has started, as one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return nullcontext()
    from ppl_vae import processes

    return processes.joined()


@app.callback()
def one_process_or_many(context: typer.Context) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ and context.invoked_subcommand not in ("train", "evaluate"):
        raise ValueError(
            f"Several processes can share train and evaluate; {context.invoked_subcommand} is done by one. Start it "
            "without torchrun."
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write; an earlier demo in it is replaced.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(help="Passes over the data, for each of the two decoders.")] = 120,
    samples: Annotated[int, typer.Option(help="Importance samples for each datum.")] = 2500,
    seed: Seed = 0,
) -> None:
    """Train two VAEs on handwritten digits, estimate their log p(x), and write a report. About half a minute."""
    from ppl_vae.cli.demo import run_demo

    run_demo(out, epochs=epochs, num_samples=samples, seed=seed)


@app.command()
def train(
    data: DataName,
    root: Root = None,
    download: Download = False,
    likelihood: Annotated[
        Literal["bernoulli", "continuous-bernoulli", "gaussian", "gaussian-per-pixel"],
        typer.Option(help="p(x given z)."),
    ] = "bernoulli",
    binarization: Annotated[
        Literal["none", "static", "dynamic", "threshold"],
        typer.Option(help="How grey values become 0 or 1, which a Bernoulli likelihood needs."),
    ] = "none",
    network: Annotated[Literal["mlp", "conv"], typer.Option(help="Of encoder and decoder.")] = "mlp",
    latent_dim: Annotated[int, typer.Option(help="The length of z.")] = 20,
    hidden_dims: Annotated[
        str, typer.Option(metavar="WIDTHS", help="Widths of the hidden layers of an mlp, such as 400,400.")
    ] = "",
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Data in a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-3,
    final_learning_rate: Annotated[
        float | None, typer.Option(help="Let the learning rate decay exponentially to this one.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop when the held-out rows have not improved for so many epochs.")
    ] = None,
    validation: Annotated[int, typer.Option(help="How many rows of the training data to hold out.")] = 0,
    seed: Seed = 0,
    compile: Compile = False,
    out: Annotated[
        Path | None, typer.Option(help="The run folder to write. Default: runs/DATA.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in that folder.")] = False,
) -> None:
    """Train a VAE and keep it, with its history and pictures, in a run folder."""
    from ppl_vae import processes
    from ppl_vae.cli import pictures, runs

    configuration = runs.Configuration(
        data=runs.recorded_source(data),
        root=str(root.expanduser().absolute()) if root else None,
        likelihood=likelihood,
        binarization=binarization,
        network=network,
        latent_dim=latent_dim,
        hidden_dims=runs.widths(hidden_dims),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        final_learning_rate=final_learning_rate,
        patience=patience,
        validation=validation,
        seed=seed,
    )
    out = out or Path("runs", Path(configuration.data).stem)
    with runs.new_folder(out, overwrite=overwrite) if processes.is_first() else nullcontext() as folder:
        run = runs.train(configuration, download=download, compile=compile)
        if folder is not None:
            runs.write(run, folder)
            pictures.draw({"loss": pictures.loss(run)}, folder)
            try:
                pictures.draw(pictures.of_model(run), folder)
            except ValueError as error:  # data that are no pictures; what was learned is kept
                typer.echo(f"Without pictures of the images: {error}", err=True)
    typer.echo(f"{run.data}\n{run.history}\nThe run is in {out}. Next: ppl-vae evaluate {out}")
    if run.history.stopped == "interrupted":
        raise typer.Exit(130)


@app.command()
def evaluate(
    run: RunFolder,
    method: Annotated[
        Literal["importance", "annealed", "grid"],
        typer.Option(
            help="Importance sampling from q; annealing from q to the posterior, which costs tens of times as much and "
            "comes closer; or an exact sum over a grid of z, for a latent_dim of 1 or 2."
        ),
    ] = "importance",
    bounds: Annotated[
        bool,
        typer.Option(
            "--bounds",
            help="Also bound log p(x) from above: of the test data in expectation, and of simulated data in "
            "probability. Draws the ladder from the ELBO to the upper bound.",
        ),
    ] = False,
    num_samples: Annotated[
        int | None, typer.Option(help="Importance samples for each datum. Default: 1000.", show_default=False)
    ] = None,
    num_chains: Annotated[
        int | None, typer.Option(help="Annealed chains for each datum. Default: 16.", show_default=False)
    ] = None,
    num_temperatures: Annotated[
        int | None, typer.Option(help="Steps of a chain from q to the posterior. Default: 100.", show_default=False)
    ] = None,
    num_data: Annotated[
        int | None, typer.Option(help="Score only so many test data, chosen by the seed. Default: all.")
    ] = None,
    seed: Seed = 0,
    compile: Compile = False,
) -> None:
    """Estimate log p(x) of the test data, per datum and with its error, and bound it from both sides."""
    from ppl_vae.cli import evaluation

    plan = evaluation.planned(
        method,
        bounds=bounds,
        num_data=num_data,
        seed=seed,
        compile=compile,
        num_samples=num_samples,
        num_chains=num_chains,
        num_temperatures=num_temperatures,
    )
    evaluation.evaluate(run, plan)


@app.command()
def compare(
    data: DataName,
    root: Root = None,
    download: Download = False,
    likelihoods: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Such as bernoulli,gaussian,binomial; or all that have a place on the data."
        ),
    ] = "all",
    latent_dim: Annotated[int, typer.Option(help="The length of z.")] = 10,
    hidden_dims: Annotated[
        str, typer.Option(metavar="WIDTHS", help="Widths of the hidden layers of the mlps, such as 400,400.")
    ] = "256",
    epochs: Annotated[int, typer.Option(help="Passes over the data, at most.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Data in a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, at first; it decays to a twentieth.")] = 2e-3,
    patience: Annotated[
        int, typer.Option(help="Stop when the held-out tenth has not improved for so many epochs.")
    ] = 10,
    num_samples: Annotated[int, typer.Option(help="Importance samples for each datum.")] = 1000,
    num_data: Annotated[
        int | None, typer.Option(help="Score only so many test data, chosen by the seed. Default: all.")
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write. Default: runs/compare-DATA.", show_default=False)
    ] = None,
) -> None:
    """Train the same networks under several likelihoods: one table per measure, and pictures. Goes on where it was.

    All likelihoods on the digits take one core about four minutes.
    """
    import ppl_vae as pv
    from ppl_vae.cli import comparison, runs

    source = runs.recorded_source(data)
    comparison.compare(
        pv.data.load(data, root=root, download=download),
        likelihoods,
        out or Path("runs", f"compare-{Path(source).stem}"),
        num_data=num_data,
        seed=seed,
        latent_dim=latent_dim,
        hidden_dims=runs.widths(hidden_dims) or [],
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        num_samples=num_samples,
    )


@app.command()
def sample(
    run: RunFolder,
    num_samples: Annotated[int, typer.Option(help="How many images.")] = 64,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("samples.png"),
) -> None:
    """Draw new images: z from the prior, and the mean of p(x given z)."""
    from ppl_vae.cli import runs

    runs.write_samples(run, out, num_samples=num_samples, seed=seed)
    typer.echo(f"{num_samples} samples are in {out}.")


@app.command()
def reproduce(
    paper: Annotated[Literal["iwae"], typer.Argument(help="iwae: Burda et al. (2016), Table 1, MNIST.")],
    layers: Annotated[Literal["1", "2"], typer.Option(help="Stochastic layers.")] = "1",
    k: Annotated[Literal["1", "5", "50"], typer.Option(help="Samples of z for each image and step.")] = "1",
    objective: Annotated[
        Literal["iwae", "vae", "dreg"],
        typer.Option(help="The bound of k samples, the mean of k ELBOs, or the bound with a less noisy gradient."),
    ] = "iwae",
    passes: Annotated[
        int | None,
        typer.Option(help="Stop after so many passes over the data. Default: all 3,280.", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop after the pass in which so many minutes of training are over.", show_default=False),
    ] = None,
    compressed: Annotated[
        bool,
        typer.Option(
            "--compressed",
            help="Not the beginning of the protocol but all its learning rates within the passes or minutes, in "
            "batches of 100. For a short budget this ends higher.",
        ),
    ] = False,
    root: Root = None,
    download: Download = False,
    num_data: Annotated[int, typer.Option(help="How many test images to score, chosen by the seed.")] = 1000,
    num_samples: Annotated[int, typer.Option(help="Importance samples for each; 5,000 as published.")] = 5000,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder of the run. Default: runs/iwae-LAYERS-K-OBJECTIVE.", show_default=False),
    ] = None,
) -> None:
    """Repeat a published experiment within a budget, and print its number beside the published one.

    The same command goes on where it was stopped, and a larger budget where a smaller one ended. All is as published,
    but that batches come in random order and that the scale of a latent is the softplus of its feature.
    """
    from ppl_vae.cli import reproduction

    budget = reproduction.Budget(passes, minutes, compressed)
    experiment = reproduction.Experiment(int(layers), int(k), objective, seed, budget.compressed_to)
    out = out or Path("runs", f"{paper}-{layers}-{k}-{objective}")
    scoring = reproduction.Scoring(num_data, num_samples)
    history = reproduction.reproduce(experiment, budget, scoring, out, root=root, download=download)
    if history.stopped == "interrupted":
        typer.echo(f"{history}\nThe same command goes on from {out}.", err=True)
        raise typer.Exit(130)


@app.command()
def coin(
    heads: Annotated[int, typer.Option(help="How many tosses came up heads.")] = 400,
    tosses: Annotated[int, typer.Option(help="How many tosses there were.")] = 1000,
) -> None:
    """Fit a bent coin: in closed form, by Pyro's SVI, and with a prior."""
    if not 0 <= heads <= tosses or tosses < 1:
        raise ValueError(f"Expected at least one toss, and from 0 to {tosses} heads; got {heads} heads.")
    import torch

    import ppl_vae as pv

    x = (torch.arange(tosses) < heads).float()
    closed, fitted = pv.coin.maximum_likelihood(x), pv.coin.fit(x)
    prior = pv.coin.BetaBernoulli()
    posterior = prior.posterior(x)
    for name, value, meaning in (
        ("closed form", closed, "the share of heads"),
        ("SVI", fitted.probability, f"after {len(fitted.losses)} steps"),
        ("posterior", posterior.mean.item(), f"± {posterior.stddev.item():.4f}, the prior being uniform"),
    ):
        typer.echo(f"{name:<14}p(heads) = {value:.4f}  {meaning}")
    typer.echo(f"log p(tosses given p) at its largest  {pv.coin.log_likelihood(closed, x).item():>10.3f} nats")
    typer.echo(f"log p(tosses), p integrated out       {prior.log_px(x[None]).item():>10.3f} nats")


@app.command()
def data(name: DataName, root: Root = None, download: Download = False) -> None:
    """Load a data set and describe it; where it is missing, say how to get it."""
    from ppl_vae.cli import runs

    for line in runs.description(name, root, download):
        typer.echo(line)
