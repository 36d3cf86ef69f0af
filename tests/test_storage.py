"""What is saved comes back, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ppl_vae as pv
from ppl_vae import files, storage
from ppl_vae import likelihoods as lh
from ppl_vae.coin import BetaBernoulli
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder
from ppl_vae.posteriors import DiagonalNormal
from ppl_vae.priors import StandardNormal


def scale_fixed() -> lh.Gaussian:
    likelihood = lh.Gaussian()
    likelihood.fix_scale(torch.zeros(7), torch.ones(7))
    return likelihood


PROGRAMS: dict[str, Any] = {
    "default": lambda: pv.VAE((8, 8), 2),
    "everything given": lambda: pv.VAE(
        (8, 8),
        2,
        likelihood=Gaussian(per_pixel=True, floor=0.01),
        prior=StandardNormal(2),
        posterior=DiagonalNormal(floor=1e-3),
        encoder=ConvEncoder((8, 8), 4, channels=(2, 3), hidden_dim=5),
        decoder=ConvDecoder(2, (8, 8), num_parameters=2, channels=(3, 2), hidden_dim=5),
    ),
    "learned scale": lambda: pv.VAE((3, 8, 8), 2, likelihood=Gaussian()),
    "fixed scale, tanh": lambda: pv.VAE(
        (7,), 2, likelihood=Gaussian(0.3), encoder=MLP(7, 4, hidden_dims=(5,), activation=nn.Tanh())
    ),
    "autoencoder": lambda: pv.Autoencoder((8, 8), 2),
    "classical autoencoder": lambda: pv.Autoencoder(
        (8, 8), 2, decoder=nn.Sequential(MLP(2, (8, 8), hidden_dims=()), nn.Sigmoid(), nn.Dropout(0.25))
    ),
    "torch layers": lambda: pv.VAE(
        (7,), 2, encoder=nn.Sequential(nn.Linear(7, 5, bias=False), nn.ELU(), nn.Linear(5, 4))
    ),
    **{
        f"{name}": lambda likelihood=likelihood: pv.VAE((7,), 2, likelihood=likelihood())
        for name, likelihood in {
            "beta": lambda: lh.Beta(floor=0.01),
            "binned": lambda: lh.Binned(lh.Laplace(per_pixel=True, floor=0.01), 17),
            "binned interval": lambda: lh.Binned(lh.ContinuousBernoulli()),
            "discretised": lambda: lh.DiscretisedLogistic(17, per_pixel=True, floor=0.02),
            "discretised, fixed": lambda: lh.DiscretisedGaussian(scale=0.25),
            "discretised, learned": lambda: lh.DiscretisedGaussian(),
            "mixture": lambda: lh.LogisticMixture(3, 17, floor=0.01),
            "tables": lambda: lh.Categorical(5),
            "trials": lambda: lh.Binomial(5),
            "laplace": lh.Laplace,
            "logistic": lambda: lh.Logistic(0.5),
            "student": lambda: lh.StudentT(3.0, per_pixel=True),
            "scale fixed on data": scale_fixed,
            "poisson": lh.Poisson,
            "genes": lambda: lh.NegativeBinomial(shape=(7,)),
            "fixed dispersion": lambda: lh.NegativeBinomial(2.5),
            "zero-inflated": lambda: lh.ZeroInflatedNegativeBinomial(per_pixel=True),
        }.items()
    },
    "colours": lambda: pv.VAE((3, 2, 2), 2, likelihood=lh.LogisticMixture(2, rgb=True)),
    "two layers": lambda: pv.HierarchicalVAE(
        (2, 4), (3, 2), hidden_dims=((5,), ()), activation=nn.ELU(), likelihood=Gaussian(per_pixel=True)
    ),
    "conditional": lambda: pv.ConditionalVAE(7, 5, 2, hidden_dims=(13,), activation=nn.Softplus()),
    "few labels": lambda: pv.M2((2, 4), 5, 2, hidden_dims=(13, 11), likelihood=lh.Categorical(3)),
    "linear gaussian": lambda: pv.LinearGaussian(torch.randn(7, 3).double(), torch.randn(7), 0.5),
    "beta bernoulli": lambda: BetaBernoulli(2.0, 3.5),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    program = PROGRAMS[name]()
    path = tmp_path / "folder" / "weights.safetensors"
    pv.save(program, path)
    again = pv.load(path)
    assert type(again) is type(program)
    assert repr(again) == repr(program)
    state, other = program.state_dict(), again.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state)
    assert storage.described(again) == storage.described(program)
    if isinstance(program, pv.M2):
        x = torch.rand(5, *program.data_shape)
        assert torch.equal(program.classify(x).logits, again.classify(x).logits)
    if isinstance(program, (pv.VAE, pv.HierarchicalVAE)):
        x = torch.rand(5, *program.data_shape)
        assert torch.equal(program.reconstruct(x), again.reconstruct(x))


def test_a_foreign_module_needs_a_program_to_load_into(tmp_path: Path) -> None:
    class Mine(nn.Linear):
        pass

    vae = pv.VAE((7,), 2, encoder=Mine(7, 4))
    path = tmp_path / "weights.safetensors"
    pv.save(vae, path)
    with pytest.raises(ValueError, match=r"holds a .*Mine, which is not a class of this package.*into=program"):
        pv.load(path)
    other = pv.VAE((7,), 2, encoder=Mine(7, 4))
    assert pv.load(path, into=other) is other
    assert torch.equal(other.encoder.weight, vae.encoder.weight)
    with pytest.raises(ValueError, match="do not fit VAE"):
        pv.load(path, into=pv.VAE((7,), 3, encoder=Mine(7, 6)))


@pytest.mark.parametrize("name", ["os.system", "Popen", "VAE.__init__", None])
def test_a_file_cannot_name_what_it_likes(name: Any, tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    files.write_tensors(path, {}, {"program": json.dumps({"class": name, "arguments": {"command": "true"}})})
    with pytest.raises(ValueError, match="not a class of this package"):
        pv.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pv.load(tmp_path / "nothing.safetensors")
    tensors = tmp_path / "tensors.safetensors"
    files.write_tensors(tensors, {"a": torch.zeros(3)}, {})
    with pytest.raises(ValueError, match=r"was not written by ppl_vae\.save"):
        pv.load(tensors)
    path = tmp_path / "weights.safetensors"
    pv.save(pv.VAE((7,), 2), path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="corrupt"):
        pv.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="corrupt"):
        pv.load(path)


def test_every_part_is_known_to_storage() -> None:
    """A family added to a room must be loadable."""
    from ppl_vae import likelihoods, networks, posteriors, priors

    abstract = {"Likelihood", "LocationScale", "Posterior"}
    for room in (likelihoods, networks, posteriors, priors):
        for name, value in vars(room).items():
            if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__.startswith(room.__name__):
                assert name in abstract or storage.KNOWN.get(name) is value
    assert storage.KNOWN["Bernoulli"] is Bernoulli
