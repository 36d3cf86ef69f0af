"""Evaluation leaves nothing behind, whatever happens inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppl_vae import isolation


def test_modes_gradients_and_random_state_come_back_after_an_error() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    network[2].eval()
    state, buffers = torch.get_rng_state(), {k: v.clone() for k, v in network.state_dict().items()}

    def fails() -> None:
        with isolation.evaluation(seed=3):
            assert not network(torch.randn(5, 2)).requires_grad
            assert not network[1].training
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [m.training for m in network] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, buffers[name]) for name, value in network.state_dict().items())


def test_modules_in_evaluation_mode_stay_there() -> None:
    network = nn.Linear(2, 3).eval()
    with isolation.evaluation():
        network(torch.zeros(2))
    assert not network.training


def test_no_seed_moves_the_global_random_state() -> None:
    with isolation.evaluation():
        a = torch.rand(3)
    with isolation.seeded(None):
        b = torch.rand(3)
    assert not torch.equal(a, b)


def test_seeds_nest() -> None:
    with isolation.seeded(1):
        first = torch.rand(3)
        with isolation.seeded(2):
            torch.rand(7)
        second = torch.rand(3)
    with isolation.seeded(1):
        assert torch.equal(torch.cat([first, second]), torch.rand(6))


def test_on_call_sees_every_module_once_per_call() -> None:
    network, called = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
    with isolation.on_call(called.append):
        network(torch.zeros(2))
    network(torch.zeros(2))
    assert called == [network, *network]
