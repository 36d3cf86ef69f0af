"""Networks: shapes, leading dimensions, and the module that runs is the module that is registered."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from torch import nn

from ppl_vae.networks import MLP, ConditionalMLP, ConvDecoder, ConvEncoder, over_leading, register

SHAPES = [(28, 28), (3, 32, 32), (8, 8), (25, 13), (1, 5, 7)]
LEADING = [(), (3,), (2, 3), (2, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", LEADING)
def test_any_number_of_leading_dimensions(shape: tuple[int, ...], leading: tuple[int, ...]) -> None:
    networks: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = [
        (MLP(shape, 11, hidden_dims=(13,)), shape, (11,)),
        (MLP(5, (2 * shape[0], *shape[1:]), hidden_dims=(13,)), (5,), (2 * shape[0], *shape[1:])),
        (ConvEncoder(shape, 11, channels=(2, 3), hidden_dim=13), shape, (11,)),
        (
            ConvDecoder(5, shape, num_parameters=2, channels=(3, 2), hidden_dim=13),
            (5,),
            (2 * shape[0], *shape[1:]),
        ),
    ]
    for network, in_shape, out_shape in networks:
        x = torch.randn(*leading, *in_shape)
        y = network(x)
        assert y.shape == (*leading, *out_shape)
        if leading:
            one = network(x[(0,) * len(leading)])
            torch.testing.assert_close(y[(0,) * len(leading)], one, rtol=1e-4, atol=1e-5)


def test_parameters_of_a_grey_image_are_stacked_along_its_first_dimension() -> None:
    """Channel c of the last convolution is parameter c: rows c·height to (c + 1)·height."""
    decoder = ConvDecoder(3, (5, 7), num_parameters=2)
    last = decoder.layers[-1]
    assert isinstance(last, nn.ConvTranspose2d)
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([1.0, 2.0]))
    features = decoder(torch.randn(11, 3))
    assert (features[:, :5] == 1).all()
    assert (features[:, 5:] == 2).all()


def test_an_mlp_is_the_composition_of_its_layers() -> None:
    mlp = MLP((2, 3), (5,), hidden_dims=(7, 11), activation=nn.Tanh())
    x = torch.randn(13, 2, 3)
    a, b, c = mlp.layers
    torch.testing.assert_close(mlp(x), c(torch.tanh(b(torch.tanh(a(x.flatten(1)))))))
    assert isinstance(MLP(2, 3, hidden_dims=()).layers[0], nn.Linear)
    assert isinstance(MLP(2, 3).activation, nn.ReLU)


@pytest.mark.parametrize("hidden_dims", [(), (13,), (13, 11)])
def test_a_conditional_mlp_is_an_mlp_of_x_beside_the_code_of_y(hidden_dims: tuple[int, ...]) -> None:
    network = ConditionalMLP((2, 3), 5, (7, 1), hidden_dims=hidden_dims, activation=nn.Tanh())
    plain = MLP(6 + 5, (7, 1), hidden_dims=hidden_dims, activation=nn.Tanh())
    with torch.no_grad():
        plain.layers[0].weight.copy_(torch.cat([network.of_x.weight, network.of_y.weight.T], 1))
        plain.layers[0].bias.copy_(network.of_x.bias)
    if network.rest is not None:
        for layer, other in zip(plain.layers[1:], network.rest.layers, strict=True):
            layer.load_state_dict(other.state_dict())
    x, y = torch.randn(11, 2, 3), torch.arange(11) % 5
    expected = plain(torch.cat([x.flatten(1), nn.functional.one_hot(y, 5)], 1))
    torch.testing.assert_close(network(x, y), expected)
    each = network(x, torch.arange(5).unsqueeze(1))
    assert each.shape == (5, 11, 7, 1)
    torch.testing.assert_close(each[y, torch.arange(11)], expected)
    torch.testing.assert_close(network(x.expand(3, 11, 2, 3), y)[2], expected)
    assert network.of_y.weight.abs().max() <= 11**-0.5


def test_over_leading_hides_leading_dimensions() -> None:
    seen: list[Any] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape)
            return x.sum(-1)

    y = over_leading(Spy(), torch.ones(2, 3, 5, 7), event_dim=2)
    assert seen == [(6, 5, 7)]
    assert y.shape == (2, 3, 5)


@pytest.mark.parametrize("bad", [0, -1, (), (3, 0), 2.5])
def test_bad_sizes_are_refused(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"must be one or more sizes|not iterable"):
        MLP(bad, 3)


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MLP expects inputs of shape \(\.\.\., 2, 3\); got \(5, 3, 2\)"):
        MLP((2, 3), 1)(torch.zeros(5, 3, 2))
    with pytest.raises(ValueError, match=r"ConditionalMLP expects inputs of shape \(\.\.\., 2, 3\); got \(5, 3, 2\)"):
        ConditionalMLP((2, 3), 5, 1)(torch.zeros(5, 3, 2), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"images of shape \(\.\.\., 8, 8\); got"):
        ConvEncoder((8, 8), 1)(torch.zeros(5, 8, 7))
    with pytest.raises(ValueError, match="A convolution needs data of shape"):
        ConvEncoder((8,), 1)


def test_register_takes_the_place_of_an_earlier_module() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    for module in (first, second, first):
        register("decoder", module)
        assert pyro.param("decoder$$$weight") is module.weight
        assert pyro.param("decoder$$$bias") is module.bias
    first.weight.requires_grad_(False)
    pyro.clear_param_store()
    register("decoder", first)
    assert list(pyro.get_param_store()) == ["decoder$$$bias"]
