"""Priors and posteriors: their densities, shapes, gradients and refusals."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from math import log, pi
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import ppl_vae as pv
from ppl_vae import likelihoods
from ppl_vae.posteriors import (
    CouplingFlow,
    DiagonalNormal,
    FullCovarianceNormal,
    NormalMixture,
    Point,
    Posterior,
    SplineFlow,
)
from ppl_vae.priors import Flat, FlowPrior, GaussianMixture, StandardNormal, VampPrior

POSTERIORS: dict[str, Any] = {
    "diagonal": lambda dim: DiagonalNormal(),
    "full": lambda dim: FullCovarianceNormal(),
    "mixture": lambda dim: NormalMixture(5),
    "coupling": lambda dim: CouplingFlow(dim, hidden_dim=7, context_dim=3),
    "spline": lambda dim: SplineFlow(dim, hidden_dims=(7,), num_bins=5, context_dim=3),
}
PRIORS: dict[str, Any] = {
    "standard": StandardNormal,
    "mixture": lambda dim: GaussianMixture(dim, 5),
    "flow": lambda dim: FlowPrior(dim, num_layers=3, hidden_dim=7),
}


def posterior(name: str, dim: int) -> Posterior:
    """With weights as if it had been trained."""
    if name == "spline":
        need_zuko()
    return trained(POSTERIORS[name](dim).double())


def need_zuko() -> None:
    if find_spec("zuko") is None:
        pytest.skip("zuko, of the extra [flows], is not installed")


def trained(module: Any) -> Any:
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g).double())
    return module


def grid(reach: float = 10.0, num: int = 300) -> tuple[Tensor, float]:
    axis = torch.linspace(-reach, reach, num).double()
    return torch.cartesian_prod(axis, axis), (2 * reach / (num - 1)) ** 2


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
@pytest.mark.parametrize("prior", [StandardNormal, Flat, GaussianMixture, FlowPrior])
def test_bad_latent_dims_are_refused(prior: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match="latent_dim must be an integer of at least 1; got"):
        prior(bad)


@pytest.mark.parametrize("name", POSTERIORS)
class TestEveryPosterior:
    def test_it_integrates_to_one_and_has_the_moments_of_its_draws(self, name: str) -> None:
        family = posterior(name, 2)
        q = family(0.3 * torch.randn(family.num_features(2)).double())
        z, cell = grid()
        with torch.no_grad():
            weight = q.log_prob(z).exp() * cell
            draws = q.sample((10_000,))
        assert abs(weight.sum().item() - 1) < 1e-4
        for power in (1, 2):
            moment = (weight[:, None] * z**power).sum(0)
            error = (draws**power).std(0) / 100
            assert ((draws.pow(power).mean(0) - moment).abs() < 4.5 * error).all()
        # A flow's mean is that of 100 draws.
        assert ((q.mean - (weight[:, None] * z).sum(0)).abs() < 4.5 * draws.std(0) / 10).all()

    @pytest.mark.parametrize(("batch", "dim"), [((11,), 3), ((5,), 5), ((2, 7), 3), ((), 2)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shapes_and_strangers(self, name: str, batch: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
        """A density knows nothing of who drew the point, nor of the other data in the batch."""
        family = posterior(name, dim).to(dtype)
        features = torch.randn(*batch, family.num_features(dim)).to(dtype)
        q = family(features)
        assert q.batch_shape == batch
        assert q.event_shape == (dim,)
        assert q.has_rsample
        z = q.rsample((13,))
        assert z.shape == (13, *batch, dim)
        assert z.dtype == q.mean.dtype == dtype
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
        log_q = q.log_prob(z)
        assert log_q.shape == (13, *batch)
        torch.testing.assert_close(family(features).log_prob(z.detach().clone()), log_q, **close)
        rows = features.reshape(-1, features.shape[-1])
        alone = [family(row).log_prob(z_row) for row, z_row in zip(rows, z.reshape(13, -1, dim).unbind(1), strict=True)]
        torch.testing.assert_close(torch.stack(alone, 1).reshape(log_q.shape), log_q, **close)
        expanded = q.expand((3, *batch))
        torch.testing.assert_close(expanded.log_prob(z[:3]), log_q[:3], **close)
        assert expanded.sample((2,)).shape == (2, 3, *batch, dim)

    def test_gradients_reach_all_features_and_weights(self, name: str) -> None:
        family = posterior(name, 3)
        features = torch.randn(5, family.num_features(3)).double().requires_grad_()
        q = family(features)
        z = q.rsample((7,))
        (z.square().sum() + q.log_prob(z.detach()).sum()).backward()
        for tensor in (features, *family.parameters()):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert (tensor.grad != 0).any()
        assert (features.grad != 0).any(0).all()

    @pytest.mark.parametrize("size", [-1e4, 1e4])
    def test_features_of_any_size_give_finite_numbers(self, name: str, size: float) -> None:
        family = posterior(name, 3).float()
        q = family(torch.full((5, family.num_features(3)), size))
        z = q.sample((7,))
        assert z.isfinite().all()
        assert q.log_prob(z).isfinite().all()

    def test_a_vae_refuses_another_length(self, name: str) -> None:
        family = posterior(name, 3).float()
        if name in ("coupling", "spline"):
            with pytest.raises(ValueError, match=f"This {type(family).__name__} was built for latents of 3"):
                pv.VAE(7, 2, posterior=family)
        else:
            assert pv.VAE(7, 2, posterior=family).encode(torch.zeros(5, 7)).event_shape == (2,)


class TestFullCovariance:
    def test_it_is_the_normal_with_that_covariance(self) -> None:
        """And every covariance is one of it."""
        g = torch.Generator().manual_seed(6)
        root = torch.randn(11, 5, 5, generator=g).double()
        covariance, loc = root @ root.mT + 0.1 * torch.eye(5), torch.randn(11, 5, generator=g).double()
        q = FullCovarianceNormal()(features_of(loc, covariance))
        torch.testing.assert_close(q.covariance_matrix, covariance)
        torch.testing.assert_close(q.mean, loc)
        z = torch.randn(7, 11, 5, generator=g).double()
        rest = (z - loc).unsqueeze(-1)
        by_hand = -0.5 * ((rest.mT @ covariance.inverse() @ rest)[..., 0, 0] + covariance.logdet() + 5 * log(2 * pi))
        torch.testing.assert_close(q.log_prob(z), by_hand)

    def test_the_exact_posterior_is_one_of_it(self) -> None:
        """So that every weight is p(x); without what is below the diagonal it would not be."""
        lg = pairs.linear_gaussian()
        x, family = pairs.simulated(lg), FullCovarianceNormal()

        def log_weights(keep: float) -> Tensor:
            def guide(data: Tensor) -> None:
                exact = lg.posterior(data)
                features = features_of(exact.mean, exact.covariance_matrix.expand(len(data), -1, -1))
                features[:, 2 * pairs.LATENT_DIM :] *= keep
                with pyro.plate("data", len(data)):
                    pyro.sample("z", family(features))

            return pv.log_weights(lg.model, guide, x, num_samples=5)

        torch.testing.assert_close(log_weights(1.0), lg.log_px(x).expand(5, -1), rtol=1e-6, atol=1e-6)
        assert (log_weights(0.0) - lg.log_px(x)).abs().max() > 0.1


def features_of(loc: Tensor, covariance: Tensor) -> Tensor:
    """The features that `FullCovarianceNormal` turns into a normal with these moments."""
    root, dim = torch.linalg.cholesky(covariance), loc.shape[-1]
    scale = root.diagonal(dim1=-2, dim2=-1)
    below = (root / scale.unsqueeze(-1))[..., *torch.tril_indices(dim, dim, offset=-1)] * dim**0.5
    return torch.cat([loc, (scale - 1e-5).expm1().log(), below], -1)


@pytest.mark.parametrize("name", ["coupling", "spline"])
def test_a_flow_starts_as_the_diagonal_normal_and_then_sees_the_datum(name: str) -> None:
    if name == "spline":
        need_zuko()
    family = POSTERIORS[name](3).double()
    features = torch.randn(7, family.num_features(3)).double()
    z = torch.randn(5, 7, 3).double()
    normal = DiagonalNormal()(features[..., :6])
    torch.testing.assert_close(family(features).log_prob(z), normal.log_prob(z))
    torch.testing.assert_close(family(features).mean, normal.mean)
    other = features.clone()
    other[..., 6:] += 1
    bent = trained(family)
    assert ((bent(other).log_prob(z) - bent(features).log_prob(z)).abs() > 1e-3).any(0).all()


def test_a_mixture_of_one_is_the_diagonal_normal() -> None:
    features, z = torch.randn(7, 1 + 6).double(), torch.randn(5, 7, 3).double()
    q, normal = NormalMixture(1)(features), DiagonalNormal()(features[:, 1:])
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z))
    torch.testing.assert_close(q.variance, normal.variance)
    with pytest.raises(ValueError, match="num_components must be an integer of at least 1; got 0"):
        NormalMixture(0)


class TestZuko:
    def test_it_is_imported_without_its_side_effect(self) -> None:
        need_zuko()  # conftest looks at the switch as well
        before = torch.distributions.Distribution._validate_args
        SplineFlow(3)
        assert torch.distributions.Distribution._validate_args == before
        with pytest.raises(ValueError, match="A spline flow needs 2 layers or more"):
            SplineFlow(3, num_layers=1)

    def test_without_it_the_install_line_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "zuko", None)
        with pytest.raises(ImportError, match="which is not installed: pip install zuko"):
            SplineFlow(3)


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_integrates_to_one_and_learns(name: str) -> None:
    prior = trained(PRIORS[name](2).double())
    p = prior()
    z, cell = grid()
    with torch.no_grad():
        weight = p.log_prob(z).exp() * cell
        draws = p.sample((10_000,))
    assert abs(weight.sum().item() - 1) < 1e-4
    moment, error = (weight[:, None] * z).sum(0), draws.std(0) / 100
    assert ((draws.mean(0) - moment).abs() < 4.5 * error).all()
    assert p.expand((7,)).log_prob(torch.zeros(5, 7, 2).double()).shape == (5, 7)
    assert p.event_shape == (2,)
    if learned := list(prior.parameters()):
        p.log_prob(torch.randn(11, 2).double()).sum().backward()
        assert all((parameter.grad != 0).any() for parameter in learned)
    assert PRIORS[name](3)().sample((5,)).dtype == torch.float32


def test_a_mixture_prior_of_one_is_a_normal_and_a_flow_prior_starts_as_one() -> None:
    z = torch.randn(5, 3)
    prior = GaussianMixture(3, 1, floor=0.0)
    torch.testing.assert_close(prior().log_prob(z), dist.Normal(prior.loc[0], 1.0).to_event(1).log_prob(z))
    torch.testing.assert_close(FlowPrior(3)().log_prob(z), StandardNormal(3)().log_prob(z))
    with pytest.raises(ValueError, match=r"num_components must be an integer of at least 1; got 2\.5"):
        GaussianMixture(3, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be negative"):
        GaussianMixture(3, floor=-1.0)


class TestVampPrior:
    def vae(self, name: str = "diagonal", **options: Any) -> pv.VAE:
        family = posterior(name, 2).float()
        encoder = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, family.num_features(2)))
        return pv.VAE(7, 2, prior=VampPrior(11), posterior=family, encoder=encoder, **options)

    @pytest.mark.parametrize("name", POSTERIORS)
    def test_it_is_the_mean_of_q_over_the_pseudo_inputs(self, name: str) -> None:
        vae = self.vae(name).double()
        u, z = vae.prior.pseudo_inputs, torch.randn(3, 5, 2).double()
        assert u.shape == (11, 7)
        assert ((u > 0) & (u < 1)).all()
        by_hand = torch.stack([vae.encode(one).log_prob(z) for one in u]).logsumexp(0) - log(11)
        p = vae.prior()
        torch.testing.assert_close(p.log_prob(z), by_hand)
        torch.testing.assert_close(p.expand((5,)).log_prob(z), by_hand)
        draws = p.sample((10_000,))
        mean = torch.stack([vae.encode(one).mean for one in u]).mean(0)  # a flow's is that of 100 draws
        assert ((draws.mean(0) - mean).abs() < 4.5 * draws.std(0) * (1e-4 + 1e-2) ** 0.5).all()

    def test_gradients_reach_the_pseudo_inputs_and_the_encoder_which_is_there_once(self) -> None:
        vae = self.vae()
        vae.prior().log_prob(torch.randn(5, 2)).sum().backward()
        assert (vae.prior.raw.grad != 0).any(0).all()
        assert all((parameter.grad != 0).any() for parameter in vae.encoder.parameters())
        assert list(vae.state_dict()) == [
            "model.prior.raw",
            *(f"model.decoder.{name}" for name in vae.decoder.state_dict()),
            *(f"guide.encoder.{name}" for name in vae.encoder.state_dict()),
        ]
        assert len(list(vae.parameters())) == len(vae.state_dict())

    def test_a_copy_has_its_own_encoder(self) -> None:
        vae = self.vae()
        twin = copy.deepcopy(vae)
        z, before = torch.randn(5, 2), vae.prior().log_prob(torch.ones(2))
        with torch.no_grad():
            for parameter in twin.encoder.parameters():
                parameter.add_(1.0)
        assert not torch.allclose(twin.prior().log_prob(z), vae.prior().log_prob(z))
        torch.testing.assert_close(vae.prior().log_prob(torch.ones(2)), before)

    def test_it_starts_from_data(self) -> None:
        vae = self.vae()
        x = torch.bernoulli(torch.full((11, 7), 0.5))
        vae.prior.start_from(x)
        torch.testing.assert_close(vae.prior.pseudo_inputs, x, atol=0.021, rtol=0)
        with pytest.raises(ValueError, match=r"have the shape \(11, 7\); got data of \(5, 7\)"):
            vae.prior.start_from(x[:5])
        with pytest.raises(ValueError, match=r"between 0 and 1; got data from .* Pass likelihood\.inputs\(x\)"):
            vae.prior.start_from(3 * x)

    def test_levels_and_counts_are_as_the_encoder_sees_them(self) -> None:
        levels = self.vae(likelihood=likelihoods.DiscretisedLogistic(17))
        x = torch.randint(0, 17, (11, 7)).float().clamp(1, 15)
        levels.prior.start_from(levels.likelihood.inputs(x))
        q = levels.encode(x)
        same = dist.MixtureSameFamily(dist.Categorical(torch.ones(11)), q)
        z = torch.randn(5, 2)
        torch.testing.assert_close(levels.prior().log_prob(z), same.log_prob(z), rtol=1e-4, atol=1e-4)
        counts = self.vae(likelihood=likelihoods.Poisson())
        x = 40 * torch.rand(11, 7).round()
        counts.prior.start_from(counts.likelihood.inputs(x))
        torch.testing.assert_close(counts.prior.pseudo_inputs, x.log1p())

    @pytest.mark.parametrize(
        ("likelihood", "sees"),
        [
            (likelihoods.Bernoulli(), True),
            (likelihoods.Categorical(5), True),
            (likelihoods.Beta(), True),
            (likelihoods.Gaussian(), False),
            (likelihoods.Poisson(), False),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_the_range_is_that_of_the_likelihood_s_inputs(self, likelihood: Any, sees: bool) -> None:
        assert likelihood.sees_unit_interval is sees
        assert self.vae(likelihood=likelihood).prior.unit_interval is sees

    def test_in_a_pair_of_functions(self) -> None:
        encoder, decoder = pv.networks.MLP(7, 4, hidden_dims=(5,)), pv.networks.MLP(2, 7, hidden_dims=(5,))
        prior = VampPrior(3)
        prior.attach(lambda u: DiagonalNormal()(encoder(u)), (7,), unit_interval=True)

        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder)
            pyro.module("prior", prior)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior())
                pyro.sample("x", likelihoods.Bernoulli()(decoder(z)), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", DiagonalNormal()(encoder(x)))

        x = torch.bernoulli(torch.full((23, 7), 0.5))
        before = [p.clone() for p in (*encoder.parameters(), *prior.parameters())]
        pv.fit(model, guide, x, epochs=1, progress=False)
        after = [*encoder.parameters(), *prior.parameters()]
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert pv.importance_sampling(model, guide, x, num_samples=5).log_px.isfinite().all()

    def test_refusals(self) -> None:
        with pytest.raises(RuntimeError, match="A VampPrior is made from the encoder of a VAE"):
            VampPrior(3)()
        with pytest.raises(RuntimeError, match="A VampPrior is made from the encoder of a VAE"):
            VampPrior(3).start_from(torch.zeros(3, 7))
        with pytest.raises(ValueError, match="num_pseudo_inputs must be an integer of at least 1; got 0"):
            VampPrior(0)
        vae = self.vae()
        with pytest.raises(RuntimeError, match="already belongs to an encoder"):
            pv.VAE(7, 2, prior=vae.prior)
