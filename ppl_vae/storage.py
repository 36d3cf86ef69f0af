"""Programs on disk: one safetensors file that holds the weights, how the program was built, and a checksum."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae import files, likelihoods, posteriors, priors
from ppl_vae.autoencoder import Autoencoder
from ppl_vae.coin import BetaBernoulli
from ppl_vae.conditional import ConditionalVAE
from ppl_vae.hierarchical import HierarchicalVAE
from ppl_vae.linear_gaussian import LinearGaussian
from ppl_vae.networks import MLP, ConditionalMLP, ConvDecoder, ConvEncoder
from ppl_vae.semi_supervised import M2
from ppl_vae.vae import VAE

# What a file may name. Nothing else is ever imported or called on the word of a file.
PROGRAMS = (VAE, Autoencoder, HierarchicalVAE, ConditionalVAE, M2, LinearGaussian, BetaBernoulli)
NETWORKS = (MLP, ConditionalMLP, ConvEncoder, ConvDecoder)
PRIORS = (priors.Flat, priors.FlowPrior, priors.GaussianMixture, priors.StandardNormal, priors.VampPrior)
POSTERIORS = (
    posteriors.CouplingFlow,
    posteriors.DiagonalNormal,
    posteriors.FullCovarianceNormal,
    posteriors.NormalMixture,
    posteriors.Point,
    posteriors.SplineFlow,
)
LIKELIHOODS = (
    likelihoods.Bernoulli,
    likelihoods.Beta,
    likelihoods.Binned,
    likelihoods.Binomial,
    likelihoods.Categorical,
    likelihoods.ContinuousBernoulli,
    likelihoods.DiscretisedGaussian,
    likelihoods.DiscretisedLogistic,
    likelihoods.Gaussian,
    likelihoods.Laplace,
    likelihoods.Logistic,
    likelihoods.LogisticMixture,
    likelihoods.NegativeBinomial,
    likelihoods.Poisson,
    likelihoods.StudentT,
    likelihoods.ZeroInflatedNegativeBinomial,
)
LAYERS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Linear, nn.Dropout)
ALL = (*PROGRAMS, *NETWORKS, *PRIORS, *POSTERIORS, *LIKELIHOODS, *LAYERS)
KNOWN: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in ALL}


def save(program: nn.Module, path: str | Path) -> None:
    """Writes a program's weights and how it was built to one file, atomically.

    Args:
        program: a `VAE` or another program of this package; a module of your own is saved too, and is then loaded
            with `load(path, into=...)`.
        path: of the file; missing folders are made.

    Example:
        >>> import tempfile
        >>> vae = VAE((8, 8), latent_dim=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(vae, f"{folder}/vae.safetensors")
        ...     again = load(f"{folder}/vae.safetensors")
        >>> x = vae.sample(3)
        >>> torch.equal(vae.encode(x).mean, again.encode(x).mean)
        True
    """
    files.write_tensors(path, program.state_dict(), {"program": json.dumps(described(program))})


def load(path: str | Path, *, into: nn.Module | None = None) -> Any:
    """Reads what `save` wrote, after verifying its checksum.

    Args:
        path: of the file.
        into: a program built as the saved one was, to receive the weights. Needed only where it holds a module that
            is not of this package.

    Returns:
        The program, or `into`.

    Raises:
        FileNotFoundError: without such a file.
        ValueError: when the file is corrupt, was not written by `save`, names a class it may not name, or does not
            fit `into`.
    """
    tensors, metadata = files.read_tensors(path)
    if "program" not in metadata:
        raise ValueError(f"{path} holds tensors but no program: it was not written by ppl_vae.save.")
    program = _built(json.loads(metadata["program"]), path) if into is None else into
    try:
        program.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"The weights in {path} do not fit {type(program).__name__}: {error}") from error
    return program


def described(value: Any) -> Any:
    """How a program was built, as JSON: every class keeps its arguments as attributes of the same name.

    Example:
        >>> described(likelihoods.Binomial(17))
        {'class': 'Binomial', 'arguments': {'levels': 17}}
    """
    if isinstance(value, nn.Sequential):
        return {"class": "Sequential", "modules": [described(module) for module in value]}
    if isinstance(value, nn.Module):
        name = type(value).__name__
        if KNOWN.get(name) is not type(value):
            return {"class": f"{type(value).__module__}.{type(value).__qualname__}"}
        names = [name for name in inspect.signature(type(value)).parameters if hasattr(value, name)]
        return {"class": name, "arguments": {name: described(getattr(value, name)) for name in names}}
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter):
            return True  # nn.Linear(bias=True) keeps the bias itself under that name
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return list(value) if isinstance(value, tuple) else value


def _built(description: Any, path: str | Path) -> Any:
    """The inverse of `described`; tensors are ones until the weights are loaded."""
    if isinstance(description, list):
        return tuple(description)
    if not isinstance(description, dict):
        return description
    if "tensor" in description:
        return torch.ones(description["tensor"], dtype=getattr(torch, description["dtype"]))
    if description.get("class") == "Sequential":
        return nn.Sequential(*(_built(module, path) for module in description["modules"]))
    if description.get("class") not in KNOWN or "arguments" not in description:
        raise ValueError(
            f"{path} holds a {description.get('class')}, which is not a class of this package. Build the program as it "
            "was built when saved, and load the weights into it: load(path, into=program)."
        )
    return KNOWN[description["class"]](
        **{name: _built(value, path) for name, value in description["arguments"].items()}
    )
