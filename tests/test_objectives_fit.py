"""`fit` with our objectives: it lowers the loss, and reports the bound at weight 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae.objectives import (
    IWAE,
    VIMCO,
    AnalyticKL,
    BetaELBO,
    DReG,
    FreeBits,
    Objective,
    StickingTheLanding,
)
from ppl_vae.training import History, fit
from ppl_vae.vae import VAE


def small_vae() -> VAE:
    torch.manual_seed(3)
    return VAE(7, 2, encoder=nn.Linear(7, 4), decoder=nn.Linear(2, 7))


@pytest.fixture(scope="module")
def x() -> Tensor:
    g = torch.Generator().manual_seed(1)
    kind = torch.rand(101, 1, generator=g) < 0.5
    return torch.bernoulli(torch.where(kind, 0.9, 0.1).expand(-1, 7), generator=g)


def run(objective: Any, x: Tensor, **options: Any) -> tuple[VAE, History]:
    vae = small_vae()
    options = {"epochs": 5, "batch_size": 23, "learning_rate": 1e-2, "progress": False, "validation": x} | options
    return vae, fit(vae.model, vae.guide, x, objective=objective, **options)


MAKE: dict[str, Callable[[], Objective]] = {
    "iwae": lambda: IWAE(num_particles=5),
    "iwae in parts": lambda: IWAE(num_particles=5, max_particles_at_once=2),
    "dreg": lambda: DReG(num_particles=5),
    "stl": StickingTheLanding,
    "vimco": lambda: VIMCO(num_particles=5),
    "beta": lambda: BetaELBO(0.2),
    "warm-up": lambda: BetaELBO(lambda t: min(1.0, 2 * t)),
    "analytic": AnalyticKL,
    "free bits": lambda: FreeBits(0.3),
}


def error_of_two(objective: Objective, vae: VAE, x: Tensor) -> float:
    """The standard error of the difference between two estimates of the mean bound."""
    objective.progress = 1.0
    with torch.no_grad():
        one, two = (objective.terms(vae.model, vae.guide, x).bound for _ in range(2))
    return ((one - two).std() / len(x) ** 0.5).item()


@pytest.mark.parametrize("name", MAKE)
def test_every_objective_trains(name: str, x: Tensor) -> None:
    vae, history = run(MAKE[name](), x, epochs=10)
    assert history.bound[-1] > history.bound[0] + 0.1
    assert history.validation[-1] < history.validation[0] - 0.1
    # With weights that stay as they are, the bound at weight 1 and minus the validation estimate the same number.
    options = {"epochs": 1, "batch_size": 23, "learning_rate": 0.0, "progress": False, "validation": x}
    still = fit(vae.model, vae.guide, x, objective=MAKE[name](), **options)
    assert abs(still.validation[0] + still.bound[0]) < 4.5 * error_of_two(MAKE[name](), vae, x)
    assert len(history.loss) == len(history.bound) == len(history.validation) == 10


def test_the_bound_of_pyros_elbos_is_minus_the_loss(x: Tensor) -> None:
    _, history = run(Trace_ELBO(), x)
    assert history.bound == [-loss for loss in history.loss]
    _, ours = run(BetaELBO(1.0), x)
    assert ours.loss == pytest.approx(history.loss, abs=1e-3)
    assert ours.validation == pytest.approx(history.validation, abs=1e-3)
    assert ours.bound == pytest.approx([-loss for loss in ours.loss])


def test_the_reported_bound_does_not_know_of_beta_or_free_bits(x: Tensor) -> None:
    """At the same weights: nothing is learned at a learning rate of 0."""
    reports = []
    for objective in (BetaELBO(0.0), BetaELBO(1.0), BetaELBO(7.0)):
        _, history = run(objective, x, learning_rate=0.0, epochs=1)
        reports.append((history.bound, history.validation))
        assert (history.loss[0] == pytest.approx(-history.bound[0])) == (objective.beta == 1.0)
    assert reports[0] == reports[1] == reports[2]
    one, other = (run(o, x, learning_rate=0.0, epochs=1)[1] for o in (AnalyticKL(), FreeBits(50.0)))
    assert other.bound == pytest.approx(one.bound, abs=1e-5)
    assert other.validation == pytest.approx(one.validation, abs=1e-5)
    assert other.loss[0] > one.loss[0] + 90
    assert repr(one).count("bound") == 0
    assert f"bound {other.bound[-1]:.3f}" in repr(other)


def test_a_schedule_follows_the_share_of_training_done(x: Tensor) -> None:
    seen: list[float] = []

    def beta(share: float) -> float:
        seen.append(share)
        return share

    objective = BetaELBO(beta)
    run(objective, x, epochs=2, validation=None)
    steps = sorted(set(seen))
    assert steps == pytest.approx([k / 10 for k in range(10)])  # 2 epochs of 5 batches
    vae, history = run(BetaELBO(lambda t: 0.0 if t < 0.5 else 5.0), x, learning_rate=0.0, epochs=4)
    low, high = history.loss[:2], history.loss[2:]
    assert max(low) < min(high)
    assert history.bound == pytest.approx([history.bound[0]] * 4, abs=4.5 * error_of_two(BetaELBO(1.0), vae, x))


def test_early_stopping_looks_at_the_bound(x: Tensor) -> None:
    """With a weight that rises, the loss is lowest in the first epoch, and the bound highest in another."""
    vae, history = run(BetaELBO(lambda t: 20 * t), x, epochs=8, patience=3)
    best = history.validation.index(min(history.validation))
    assert history.loss.index(min(history.loss)) == 0 < best
    options: dict[str, Any] = {"learning_rate": 0.0, "epochs": 1, "batch_size": 23, "progress": False}
    again = fit(vae.model, vae.guide, x, objective=BetaELBO(1.0), validation=x, **options)
    assert again.validation[0] == history.validation[best]


def test_a_run_goes_on_where_it_stopped(x: Tensor, tmp_path: Path) -> None:
    def objective() -> BetaELBO:
        return BetaELBO(lambda t: min(1.0, t))

    whole, history = run(objective(), x, epochs=4)
    vae = small_vae()
    options: dict[str, Any] = {"batch_size": 23, "learning_rate": 1e-2, "progress": False, "validation": x}

    class Stop(BetaELBO):
        def terms(self, *args: Any) -> Any:
            if (self.progress or 0.0) >= 0.5:
                raise KeyboardInterrupt
            return super().terms(*args)

        def __repr__(self) -> str:
            return repr(objective())

    stopping = Stop(objective().beta)
    fit(vae.model, vae.guide, x, objective=stopping, epochs=4, checkpoint=tmp_path, **options)
    again = small_vae()
    continued = fit(
        again.model, again.guide, x, objective=objective(), epochs=4, checkpoint=tmp_path, resume=True, **options
    )
    assert (continued.loss, continued.bound) == (history.loss, history.bound)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"objective = BetaELBO\(a schedule\); now it is BetaELBO\(2.0\)"):
        fit(again.model, again.guide, x, objective=BetaELBO(2.0), checkpoint=tmp_path, resume=True, **options)
