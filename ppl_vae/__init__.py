"""Variational autoencoders as probabilistic programs, with a log p(x) that can be trusted.

One idea: a pair is two Pyro programs, `model(x)` and `guide(x)`, and everything else works on any pair. The left side
says what is believed, the right side does inference with whatever pair it is given, and neither imports the other:

       programs (what is believed)                               inference (what is done with any pair)
    0  networks  likelihoods  distributions                      scoring  pareto  compiling
    1  priors  posteriors                                        proposals  parameters  batches  objectives
    2  coin  vae  linear_gaussian  hierarchical  conditional     evidence  training
    3  autoencoder  semi_supervised                              gaps  diagnostics
    4  storage

       neither: isolation  precision  cross_entropy  processes  data  files  plots  reporting
       both: comparing  cli  and this file

A room imports from rooms below it on its own side and from those of neither side.

    import ppl_vae as pv

    digits = pv.data.load("digits").static_binarization()
    vae = pv.VAE((8, 8), latent_dim=10)
    pv.fit(vae.model, vae.guide, digits.train)
    pv.importance_sampling(vae.model, vae.guide, digits.test).summary()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_vae import (
        autoencoder,
        batches,
        cli,
        coin,
        comparing,
        compiling,
        conditional,
        cross_entropy,
        data,
        diagnostics,
        distributions,
        evidence,
        files,
        gaps,
        hierarchical,
        isolation,
        likelihoods,
        linear_gaussian,
        networks,
        objectives,
        parameters,
        pareto,
        plots,
        posteriors,
        precision,
        priors,
        processes,
        proposals,
        reporting,
        scoring,
        semi_supervised,
        storage,
        training,
        vae,
    )
    from ppl_vae.autoencoder import Autoencoder
    from ppl_vae.comparing import Comparison, compare
    from ppl_vae.conditional import ConditionalVAE
    from ppl_vae.diagnostics import Diagnostics, diagnose
    from ppl_vae.evidence import (
        AnnealedEvidence,
        Bounds,
        Evidence,
        Exact,
        Kind,
        ModeCheck,
        annealed_importance_sampling,
        bounds,
        enumeration,
        grid_integration,
        importance_sampling,
        mode_check,
        sandwich,
    )
    from ppl_vae.gaps import Gaps, inference_gaps
    from ppl_vae.hierarchical import HierarchicalVAE
    from ppl_vae.likelihoods import bits_per_dim
    from ppl_vae.linear_gaussian import LinearGaussian
    from ppl_vae.objectives import (
        IWAE,
        VIMCO,
        AnalyticKL,
        BetaELBO,
        DReG,
        FreeBits,
        ImportanceWeightedELBO,
        SemiSupervisedELBO,
        StickingTheLanding,
    )
    from ppl_vae.scoring import log_weights
    from ppl_vae.semi_supervised import M2
    from ppl_vae.storage import load, save
    from ppl_vae.training import History, fit
    from ppl_vae.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "IWAE",
    "M2",
    "VAE",
    "VIMCO",
    "AnalyticKL",
    "AnnealedEvidence",
    "Autoencoder",
    "BetaELBO",
    "Bounds",
    "Comparison",
    "ConditionalVAE",
    "DReG",
    "Diagnostics",
    "Evidence",
    "Exact",
    "FreeBits",
    "Gaps",
    "HierarchicalVAE",
    "History",
    "ImportanceWeightedELBO",
    "Kind",
    "LinearGaussian",
    "ModeCheck",
    "SemiSupervisedELBO",
    "StickingTheLanding",
    "annealed_importance_sampling",
    "autoencoder",
    "batches",
    "bits_per_dim",
    "bounds",
    "cli",
    "coin",
    "compare",
    "comparing",
    "compiling",
    "conditional",
    "cross_entropy",
    "data",
    "diagnose",
    "diagnostics",
    "distributions",
    "enumeration",
    "evidence",
    "files",
    "fit",
    "gaps",
    "grid_integration",
    "hierarchical",
    "importance_sampling",
    "inference_gaps",
    "isolation",
    "likelihoods",
    "linear_gaussian",
    "load",
    "log_weights",
    "mode_check",
    "networks",
    "objectives",
    "parameters",
    "pareto",
    "plots",
    "posteriors",
    "precision",
    "priors",
    "processes",
    "proposals",
    "reporting",
    "sandwich",
    "save",
    "scoring",
    "semi_supervised",
    "storage",
    "training",
    "vae",
]

_ROOM_OF = {
    "AnalyticKL": "objectives",
    "AnnealedEvidence": "evidence",
    "Autoencoder": "autoencoder",
    "BetaELBO": "objectives",
    "Bounds": "evidence",
    "Comparison": "comparing",
    "Diagnostics": "diagnostics",
    "DReG": "objectives",
    "ConditionalVAE": "conditional",
    "Evidence": "evidence",
    "Exact": "evidence",
    "FreeBits": "objectives",
    "Gaps": "gaps",
    "HierarchicalVAE": "hierarchical",
    "History": "training",
    "IWAE": "objectives",
    "ImportanceWeightedELBO": "objectives",
    "Kind": "evidence",
    "LinearGaussian": "linear_gaussian",
    "M2": "semi_supervised",
    "ModeCheck": "evidence",
    "StickingTheLanding": "objectives",
    "SemiSupervisedELBO": "objectives",
    "VAE": "vae",
    "VIMCO": "objectives",
    "annealed_importance_sampling": "evidence",
    "bits_per_dim": "likelihoods",
    "bounds": "evidence",
    "compare": "comparing",
    "diagnose": "diagnostics",
    "enumeration": "evidence",
    "fit": "training",
    "grid_integration": "evidence",
    "importance_sampling": "evidence",
    "inference_gaps": "gaps",
    "load": "storage",
    "log_weights": "scoring",
    "mode_check": "evidence",
    "sandwich": "evidence",
    "save": "storage",
}


def __getattr__(name: str) -> Any:
    """Rooms are imported when first used, so that `ppl-vae --help` need not wait for torch."""
    if name in _ROOM_OF:
        return getattr(import_module(f"ppl_vae.{_ROOM_OF[name]}"), name)
    if name in __all__:
        return import_module(f"ppl_vae.{name}")
    raise AttributeError(f"ppl_vae has no '{name}'; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
