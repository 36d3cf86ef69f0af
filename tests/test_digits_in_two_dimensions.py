"""A two-dimensional VAE trained on real digits: every estimate against the grid, which is exact."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae.proposals import Defensive, FullCovarianceNormal, Local, StudentT, Widened

NUM_DATA = 53


@pytest.fixture(scope="module")
def trained() -> tuple[pv.VAE, Tensor, pv.Exact]:
    """The VAE, test data, and their exact log p(x)."""
    with pv.isolation.seeded(0):
        digits = pv.data.load("digits").static_binarization(seed=0)
        vae = pv.VAE(
            (8, 8),
            latent_dim=2,
            encoder=pv.networks.MLP((8, 8), 4, hidden_dims=(64, 64), activation=nn.Tanh()),
            decoder=pv.networks.MLP(2, (8, 8), hidden_dims=(64, 64), activation=nn.Tanh()),
        )
        pv.fit(vae.model, vae.guide, digits.train, epochs=30, learning_rate=3e-3, progress=False, seed=0)
    x = digits.test[:NUM_DATA]
    return vae, x, pv.grid_integration(vae.model, vae.guide, x)


def test_the_grid_accepts_every_datum(trained: tuple[pv.VAE, Tensor, pv.Exact]) -> None:
    _, _, exact = trained
    assert exact.accepted.all()
    assert exact.error.max() < 1e-3
    assert (exact.kl > 0).all()


def test_annealing_is_within_a_hundredth_of_a_nat(trained: tuple[pv.VAE, Tensor, pv.Exact]) -> None:
    vae, x, exact = trained
    found = pv.annealed_importance_sampling(vae.model, vae.guide, x, num_chains=32, num_temperatures=100)
    assert (found.log_px - exact.log_px).abs().mean() < 0.01


def test_importance_sampling_is_right_within_its_error_where_it_can_be_believed(
    trained: tuple[pv.VAE, Tensor, pv.Exact],
) -> None:
    vae, x, exact = trained
    for proposal in (
        Widened(),
        StudentT(),
        Defensive(),
        Defensive(Widened(Local(FullCovarianceNormal(), num_steps=200))),
    ):
        found = pv.importance_sampling(vae.model, vae.guide, x, num_samples=4000, proposal=proposal)
        believable = found.pareto_k < 0.5
        assert believable.double().mean() > 0.3
        error = (found.log_px - exact.log_px).abs()
        assert (error < 4.5 * found.standard_error + exact.error)[believable].double().mean() > 0.97
        assert error[believable].mean() < 0.05


def test_the_tangent_bound_is_above_and_the_lower_below(trained: tuple[pv.VAE, Tensor, pv.Exact]) -> None:
    vae, x, exact = trained
    anneal = partial(pv.annealed_importance_sampling, num_temperatures=30)
    found = pv.bounds(vae.model, vae.guide, x, estimators=[anneal], num_mode_checks=0)
    above, below = found.upper - exact.log_px, exact.log_px - found.lower
    for gap in (above, below):
        assert gap.mean() > -3 * gap.std() / NUM_DATA**0.5
        assert abs(gap.mean()) < 0.02


def test_the_sandwich_is_narrow(trained: tuple[pv.VAE, Tensor, pv.Exact]) -> None:
    vae, _, _ = trained
    found = pv.sandwich(vae.model, vae.guide, num_data=NUM_DATA, num_temperatures=100)
    assert found.width.mean() < 0.1
    exact = pv.grid_integration(vae.model, vae.guide, *found.args)
    for gap in (found.upper - exact.log_px, exact.log_px - found.lower):
        assert gap.mean() > -3 * gap.std() / NUM_DATA**0.5


def test_gaps_add_up_to_the_exact_kl(trained: tuple[pv.VAE, Tensor, pv.Exact]) -> None:
    vae, x, exact = trained
    few = slice(0, 31)
    reference = pv.grid_integration(vae.model, vae.guide, x[few])
    for family in (pv.proposals.DiagonalNormal(), FullCovarianceNormal()):
        found = pv.inference_gaps(vae.model, vae.guide, x[few], family=family, num_steps=200, log_px=reference)
        assert ((found.kl - exact.kl[few]).abs() < 4.5 * found.standard_error["kl"] + 2e-3).all()
        assert (found.approximation > -4.5 * found.standard_error["approximation"] - 2e-3).all()
        estimated = pv.inference_gaps(vae.model, vae.guide, x[few], family=family, num_steps=200)
        assert (estimated.log_px - exact.log_px[few]).abs().mean() < 0.01


def test_exact_draws_bound_real_data_from_above(trained: tuple[pv.VAE, Tensor, pv.Exact]) -> None:
    """With exact posterior draws of *real* data log w is an upper bound too: E log w = log p(x) + KL(posterior, q)."""
    vae, x, exact = trained
    drawn = pv.grid_integration(vae.model, vae.guide, x, num_draws=200)
    z = drawn.draws["z"]
    with torch.no_grad():
        log_q = vae.encode(x).log_prob(z)
        log_joint = vae.prior().log_prob(z) + vae.decode(z).log_prob(x)
    eubo = (log_joint - log_q).double().mean(0)
    assert (eubo - exact.log_px).mean() > 0
    assert (eubo > exact.log_px - 0.1).double().mean() > 0.95
