"""The demonstration: one data set, two likelihoods, a report with both numbers and why they must not be compared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import ppl_vae as pv
from ppl_vae import plots
from ppl_vae.cli import evaluation, pictures, runs
from ppl_vae.reporting import Page, text_table

if TYPE_CHECKING:
    from ppl_vae.cli.pictures import Picture
    from ppl_vae.cli.runs import Run
    from ppl_vae.evidence import Evidence

DECODERS = [("bernoulli", "static", "Bernoulli (0/1)"), ("gaussian", "none", "Gaussian (grey)")]
NOT_COMPARABLE = (
    "The two rows are of different measure and must not be compared: the first is the log-probability of an image of "
    "zeros and ones, the second the log-density of an image of grey values, which may be positive and changes with "
    "their unit."
)


@dataclass(frozen=True)
class Part:
    """One decoder's share of the demonstration."""

    title: str
    row: dict[str, str]
    warnings: list[str]
    pictures: dict[str, Picture]


def run_demo(out: Path, *, epochs: int, num_samples: int, seed: int) -> None:
    """Trains, scores and draws a VAE for each decoder; prints a table, and writes two run folders and a report."""
    with runs.new_folder(out, overwrite=True, mark="bernoulli/run.json") as folder, runs.one_thread():
        parts = []
        for likelihood, binarization, title in DECODERS:
            configuration = runs.Configuration(
                data="digits",
                likelihood=likelihood,
                binarization=binarization,
                latent_dim=10,
                hidden_dims=[256],
                epochs=epochs,
                batch_size=64,
                learning_rate=2e-3,
                final_learning_rate=1e-4,
                validation=200,
                patience=12,
                seed=seed,
            )
            parts.append(_part(title, configuration, num_samples, folder / likelihood))
        _report(parts, num_samples).write(folder / "report.html")
        for (likelihood, _, _), part in zip(DECODERS, parts, strict=True):
            pictures.draw(part.pictures, folder / likelihood)
    caption = f"Test data, nats per datum, {num_samples:,} importance samples each:"
    typer.echo("\n".join(["", caption, "", text_table([part.row for part in parts]), "", NOT_COMPARABLE]))
    for part in parts:
        for warning in part.warnings:
            typer.echo(f"! {part.title}: {warning}")
    typer.echo(f"\nThe report, with pictures: {out / 'report.html'}")


def _part(title: str, configuration: runs.Configuration, num_samples: int, folder: Path) -> Part:
    typer.echo(title, err=True)
    began = time.perf_counter()
    run = runs.train(configuration)
    if run.history.stopped == "interrupted":
        raise KeyboardInterrupt
    evidence = _sampled(run, num_samples)
    results = {**evaluation.numbers(evidence, run, run.data.test), "seconds": time.perf_counter() - began}
    runs.write(run, folder, results=results)
    drawn = {
        **pictures.of_model(run),
        "loss": pictures.loss(run),
        "log_px": _settling(run, evidence),
        "pareto_k": pictures.pareto_k(evidence),
    }
    return Part(title, _row(title, results), evidence.warnings(), drawn)


def _sampled(run: Run, num_samples: int) -> Evidence:
    """The evidence of all test data."""
    seed = run.configuration.seed
    return pv.importance_sampling(run.vae.model, run.vae.guide, run.data.test, num_samples=num_samples, seed=seed)


def _row(title: str, results: dict[str, Any]) -> dict[str, str]:
    bits = results["bits_per_dim"]
    return {
        "decoder": title,
        "log p(x)": f"{results['log_px']:.2f} ± {results['mean_standard_error']:.2f}",
        "ELBO": f"{results['elbo']:.2f}",
        "bits/dim": "–" if bits is None else f"{bits:.3f}",
        "Pareto k < 0.7": f"{100 * results['share_pareto_k_below_0.7']:.0f} %",
        "seconds": f"{results['seconds']:.0f}",
    }


def _settling(run: Run, evidence: Evidence) -> Picture:
    fewer = [k for k in (1, 3, 10, 30, 100, 300, 1000, 3000) if k < evidence.num_samples]
    estimates = [*(_sampled(run, k) for k in fewer), evidence]
    ax = plots.estimate_against_samples(
        [e.num_samples for e in estimates], [e.mean for e in estimates], [e.mc_standard_error for e in estimates]
    )
    return ax, (
        "The estimate of log p(x) against the number of samples. With one sample it is a noisy estimate of the ELBO. "
        "The band is over other samples only; it does not show how far the estimate is too low. A curve that still "
        "rises has not settled."
    )


def _report(parts: list[Part], num_samples: int) -> Page:
    page = Page("Two VAEs on handwritten digits")
    page.text(
        "Both have a latent space of ten dimensions and were trained on 1,238 images of 8 × 8 pixels, with 200 more to "
        "say when to stop; the numbers of the table are about 359 others that they have not seen. They differ in "
        "p(x given z): a Bernoulli for each pixel, the pixels having been set to 0 or 1 once with the grey value as "
        "probability, or a Gaussian for each grey value, with one learned scale for all."
    )
    page.table(
        [part.row for part in parts],
        caption=f"Test data, nats per datum; importance sampling with {num_samples:,} samples each. Seconds are those "
        "of training and scoring.",
    )
    page.text(NOT_COMPARABLE)
    for part in parts:
        for warning in part.warnings:
            page.text(f"⚠ {part.title}: {warning}")
    page.heading("How to read the numbers")
    for text in (
        "log p(x) is the natural logarithm of the probability (or density) that the model gives a test image, on "
        "average over the images: the higher, the better, among models of the same kind of data. The number after ± "
        "is its standard error for other test images and other samples. It is estimated as the logarithm of the mean "
        "of p(x, z) / q(z given x) over z drawn from q(z given x), which is too low rather than too high.",
        "The ELBO is what training raises, a lower bound of log p(x). What it lacks is the Kullback-Leibler divergence "
        "of q(z given x) from the exact posterior.",
        "Bits per dimension are −log₂ p(x) divided by the number of pixels: 1 would be tossing a fair coin for each. "
        "They exist for probabilities only; a density has a dash.",
        "Pareto k says for each image whether its log p(x) can be believed. Above 0.7 a few samples carry the whole "
        "estimate, which is then too low by an amount that these samples cannot tell. The share below 0.7 should be "
        "near 100 %; with fewer than about 2,200 samples the warnings draw the line somewhat below 0.7.",
    ):
        page.text(text)
    for part in parts:
        page.heading(part.title)
        for ax, caption in part.pictures.values():
            page.figure(ax, caption)
    return page
