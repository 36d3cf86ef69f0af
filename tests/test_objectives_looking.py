"""A pair is looked at once, and again when it has changed."""

from __future__ import annotations

import gc
import pickle
import weakref
from copy import deepcopy
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_vae.objectives import IWAE, DReG, looking
from ppl_vae.training import fit
from ppl_vae.vae import VAE


@pytest.fixture
def lg() -> Any:
    return pairs.linear_gaussian()


@pytest.fixture
def x(lg: Any) -> Tensor:
    return pairs.simulated(lg)


def test_a_scale_that_comes_in_later_is_seen(lg: Any, x: Tensor) -> None:
    model, guide = pairs.as_functions(lg, lg.posterior)
    settings = {"beta": 1.0}

    def scaled(program: Any) -> Any:
        def run(x: Tensor) -> None:
            with poutine.scale(scale=settings["beta"]):
                program(x)

        return run

    pair = scaled(model), scaled(guide)
    objective = IWAE(num_particles=3)
    objective.loss(*pair, x)
    settings["beta"] = 0.5
    with pytest.raises(ValueError, match=r"scaled by 0\.5"):
        objective.loss(*pair, x)


@pytest.fixture
def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []

    def counting(*args: Any) -> Any:
        counted.append(1)
        return original(*args)

    original = looking.Pair
    monkeypatch.setattr(looking, "Pair", counting)
    return counted


def test_a_pair_is_looked_at_once(count_looks: list[int], lg: Any, x: Tensor) -> None:
    objective = IWAE(num_particles=3)
    for form in (pairs.as_modules, pairs.as_functions, pairs.as_bound_methods):
        count_looks.clear()
        model, guide = form(lg, lg.perturbed_guide().q)
        for batch in (x, x[:7], x[:5]):
            objective.loss(model, guide, batch)
        objective.loss(model, guide, x)
        assert len(count_looks) == 1
    count_looks.clear()
    fit(VAE(7, 2).model, (vae := VAE(7, 2)).guide, (x > 0).float(), objective=objective, epochs=3, progress=False)
    vae = VAE(7, 2)
    fit(vae.model, vae.guide, (x > 0).float(), objective=objective, epochs=3, batch_size=5, progress=False)
    assert len(count_looks) == 2  # the last batch is of one datum


def test_one_datum_does_not_show_which_plate_is_over_the_data(count_looks: list[int], lg: Any, x: Tensor) -> None:
    """A batch of one takes what was found out from a larger one, and not the other way round."""

    def model(x: Tensor) -> None:
        with pyro.plate("images", len(x), dim=-1), pyro.plate("channels", 1, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1, len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("images", len(x), dim=-1), pyro.plate("channels", 1, dim=-2):
            pyro.sample("z", dist.Normal(0.5 * x[:, 0], 0.5**0.5))

    exact = dist.Normal(0.0, 2**0.5).log_prob(x[:, 0])
    objective = IWAE(num_particles=3)
    with pytest.raises(ValueError, match="are all as long as the data"):
        objective.terms(model, guide, x[:1])
    count_looks.clear()
    for batch, expected in ((x, exact), (x[:1], exact[:1])):
        torch.testing.assert_close(objective.terms(model, guide, batch).bound, expected, rtol=0, atol=1e-6)
    assert len(count_looks) == 1
    pair = pairs.as_functions(lg, lg.posterior)
    for batch in (x[:1], x[:1], x, x[:1]):
        torch.testing.assert_close(objective.terms(*pair, batch).bound, lg.log_px(batch), rtol=0, atol=1e-6)
    assert len(count_looks) == 3


decoder: Any = None  # as a notebook has it


def test_a_network_of_another_cell_is_not_taken_for_the_old_one(count_looks: list[int], x: Tensor) -> None:
    global decoder
    x = (x > 0).float()

    class OneRow(nn.Module):
        """Mixes what has more than one leading dimension, in silence."""

        def forward(self, z: Tensor) -> Tensor:
            return z.sum(-1, keepdim=True).expand(*z.shape[:-1], 7) + (z.mean((0, 1, 2)) if z.dim() > 2 else 0.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pairs.Repeatable(x[:, :3], torch.ones(3)).to_event(1))

    objective = IWAE(num_particles=5)
    decoder = nn.Linear(3, 7)
    objective.loss(model, guide, x)
    decoder = OneRow()
    found = objective.loss(model, guide, x)
    assert found == pytest.approx(IWAE(num_particles=5).loss(model, guide, x), abs=1e-4)
    assert len(count_looks) == 3
    vae = VAE(7, 2)
    objective.loss(vae.model, vae.guide, x)
    vae.model.decoder = nn.Linear(2, 7)
    objective.loss(vae.model, vae.guide, x)
    assert len(count_looks) == 5


def test_nothing_is_kept_alive(lg: Any, x: Tensor) -> None:
    objective = IWAE(num_particles=3)
    vae = VAE(7, 2)
    objective.loss(vae.model, vae.guide, (x > 0).float())
    alive = weakref.ref(vae.model)
    del vae
    gc.collect()
    assert alive() is None
    copy = pickle.loads(pickle.dumps(objective))
    for other in (copy, deepcopy(objective)):
        assert other.num_particles == 3
        assert other.loss(*pairs.as_functions(lg, lg.posterior), x) == pytest.approx(-lg.log_px(x).sum().item())


def test_the_look_leaves_modes_and_random_numbers_alone(x: Tensor) -> None:
    vae = VAE(7, 2, encoder=nn.Sequential(nn.Linear(7, 4), nn.Dropout(0.5)))
    vae.model.eval()
    objective = DReG(num_particles=3)
    modes = {name: module.training for name, module in vae.named_modules()}
    torch.manual_seed(1)
    first = objective.loss(vae.model, vae.guide, (x > 0).float())
    torch.manual_seed(1)
    assert objective.loss(vae.model, vae.guide, (x > 0).float()) == first
    assert {name: module.training for name, module in vae.named_modules()} == modes
    torch.manual_seed(1)
    vae.eval()
    assert objective.loss(vae.model, vae.guide, (x > 0).float()) != first  # the dropout was on


def test_a_function_that_a_module_holds_is_a_part_of_it(count_looks: list[int], lg: Any, x: Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform = torch.nn.Identity().forward

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = self.transform(pyro.sample("z", pairs.prior(lg)))
                pyro.sample("x", pairs.conditional(lg, z).to_event(1), obs=x)

    model, guide = Model(), pairs.as_functions(lg, lg.posterior)[1]
    objective = IWAE(num_particles=3)
    for _ in range(2):
        objective.loss(model, guide, x)
    model.transform = lambda z: z + 0.0
    for _ in range(2):
        objective.loss(model, guide, x)
    assert len(count_looks) == 2
