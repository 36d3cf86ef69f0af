"""Priors and posteriors: their densities, shapes and refusals."""

from __future__ import annotations

from math import log, pi
from typing import Any

import pyro
import pytest
import torch
from torch.nn.functional import softplus

from ppl_vae.posteriors import DiagonalNormal, Point
from ppl_vae.priors import Flat, StandardNormal


def test_standard_normal() -> None:
    z = torch.randn(5, 3)
    torch.testing.assert_close(StandardNormal(3)().log_prob(z), -0.5 * (z.square() + log(2 * pi)).sum(-1))
    assert StandardNormal(3).double()().sample((2,)).dtype == torch.float64
    assert not StandardNormal(3).state_dict()


def test_diagonal_normal() -> None:
    q = DiagonalNormal(floor=0.01)
    assert q.num_features(3) == 6
    features = torch.randn(2, 5, 6)
    p = q(features)
    assert p.batch_shape == (2, 5)
    assert p.event_shape == (3,)
    torch.testing.assert_close(p.mean, features[..., :3])
    torch.testing.assert_close(p.stddev, 0.01 + softplus(features[..., 3:]))
    assert p.has_rsample
    assert (q(torch.full((6,), -1e6)).stddev == 0.01).all()
    assert q(torch.full((6,), 1e6)).stddev.isfinite().all()
    with pytest.raises(ValueError, match="cannot be negative"):
        DiagonalNormal(floor=-1.0)


def test_flat_and_point_have_no_say() -> None:
    z = torch.randn(5, 3)
    assert (Flat(3)().log_prob(z) == 0).all()
    assert (Flat(3)().expand([5]).log_prob(z) == 0).all()
    for draw in (lambda: Flat(3)().sample(), lambda: pyro.sample("z", Flat(3)().expand([2]))):
        with pytest.raises(NotImplementedError, match="Fit a VAE instead"):
            draw()
    q = Point()(z)
    assert torch.equal(q.sample(), z)
    assert (q.log_prob(z) == 0).all()
    assert Point().num_features(3) == 3


@pytest.mark.parametrize("bad", [0, -1, 2.5, None])
@pytest.mark.parametrize("prior", [StandardNormal, Flat])
def test_bad_latent_dims_are_refused(prior: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match="latent_dim must be an integer of at least 1; got"):
        prior(bad)
