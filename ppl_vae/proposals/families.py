"""Families of q that have parameters of their own for each datum: invertible maps of standard normal noise."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi, sqrt

import torch
from torch import Tensor
from torch.nn.functional import silu

Parameters = dict[str, Tensor]

# A layer of a flow stretches by at most e³: a few large steps cannot throw it out of the numbers.
MOST_LOG_SCALE = 3.0


class Family:
    """Densities over v `(num_samples, batch, dim)`, given as maps v = f(ε) of noise ε ~ N(0, I), one map per datum.

    log q(v) = log N(ε; 0, I) − log|dv/dε|, with ε = f⁻¹(v) for a v that comes from elsewhere. Parameters are a
    dictionary of float64 tensors `(batch, ...)`; those of one datum have no influence on another's density.
    """

    def start(self, batch: int, dim: int, device: torch.device) -> Parameters:
        """The parameters of the identity, for each datum the same."""
        raise NotImplementedError

    def forward(self, parameters: Parameters, noise: Tensor) -> tuple[Tensor, Tensor]:
        """v at the noise, and log|dv/dε| `(num_samples or 1, batch)`."""
        raise NotImplementedError

    def inverse(self, parameters: Parameters, v: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that is mapped to v, and log|dv/dε| there."""
        raise NotImplementedError

    def draw(self, parameters: Parameters, noise: Tensor) -> tuple[Tensor, Tensor]:
        """v at the noise, and its log q(v) in nats, `(num_samples, batch)`."""
        v, log_det = self.forward(parameters, noise)
        return v, _log_normal(noise) - log_det

    def log_prob(self, parameters: Parameters, v: Tensor) -> Tensor:
        """log q(v) in nats at any v, `(num_samples, batch)`."""
        noise, log_det = self.inverse(parameters, v)
        return _log_normal(noise) - log_det


@dataclass(frozen=True)
class DiagonalNormal(Family):
    """v = loc + scale ε: what almost every encoder gives.

    Example:
        >>> family = DiagonalNormal()
        >>> at_start = family.start(batch=2, dim=3, device=torch.device("cpu"))
        >>> family.log_prob(at_start, torch.zeros(1, 2, 3))           # −3/2 log 2π
        tensor([[-2.7568, -2.7568]], dtype=torch.float64)
    """

    def start(self, batch: int, dim: int, device: torch.device) -> Parameters:
        zeros = torch.zeros(batch, dim, dtype=torch.float64, device=device)
        return {"loc": zeros, "log_scale": zeros.clone()}

    def forward(self, parameters: Parameters, noise: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = parameters["log_scale"]
        return parameters["loc"] + log_scale.exp() * noise, log_scale.sum(-1)[None]

    def inverse(self, parameters: Parameters, v: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = parameters["log_scale"]
        return (v - parameters["loc"]) * (-log_scale).exp(), log_scale.sum(-1)[None]


@dataclass(frozen=True)
class FullCovarianceNormal(Family):
    """v = loc + scale (ε + N ε) with a strictly lower triangular N: any normal, at dim² / 2 parameters per datum.

    Example:
        >>> family = FullCovarianceNormal()
        >>> {name: tuple(p.shape) for name, p in family.start(2, 3, torch.device("cpu")).items()}
        {'loc': (2, 3), 'log_scale': (2, 3), 'lower': (2, 3, 3)}
    """

    def start(self, batch: int, dim: int, device: torch.device) -> Parameters:
        lower = torch.zeros(batch, dim, dim, dtype=torch.float64, device=device)
        return DiagonalNormal().start(batch, dim, device) | {"lower": lower}

    def forward(self, parameters: Parameters, noise: Tensor) -> tuple[Tensor, Tensor]:
        mixed = noise + torch.einsum("bij,sbj->sbi", parameters["lower"].tril(-1), noise)
        return DiagonalNormal().forward(parameters, mixed)

    def inverse(self, parameters: Parameters, v: Tensor) -> tuple[Tensor, Tensor]:
        mixed, log_det = DiagonalNormal().inverse(parameters, v)
        columns = mixed.permute(1, 2, 0)
        # Only what is below the diagonal is read; the diagonal is one.
        solved = torch.linalg.solve_triangular(parameters["lower"], columns, upper=False, unitriangular=True)
        return solved.permute(2, 0, 1), log_det


@dataclass(frozen=True)
class CouplingFlow(Family):
    """Affine coupling layers between the noise and a diagonal normal's loc and scale.

    Each layer leaves one half of the coordinates as they are and gives the other a shift and a scale that depend on
    the first, by a network of one hidden layer whose weights belong to the datum; the halves take turns. Its inverse
    is exact, so that its density is known everywhere.

    Args:
        num_layers: 2 or more, for every coordinate to be moved.
        hidden_dim: width of each layer's network.

    Raises:
        ValueError: for fewer layers or units; in `start`, for fewer than 2 dimensions.

    Reference:
        Dinh, Sohl-Dickstein & Bengio, Density Estimation using Real NVP, 2017. https://arxiv.org/abs/1605.08803

    Example:
        >>> family = CouplingFlow(num_layers=2, hidden_dim=5)
        >>> at_start = family.start(batch=1, dim=3, device=torch.device("cpu"))
        >>> noise = torch.randn(4, 1, 3).double()
        >>> torch.equal(family.forward(at_start, noise)[0], noise)
        True
    """

    num_layers: int = 4
    hidden_dim: int = 32

    def __post_init__(self) -> None:
        if self.num_layers < 2 or self.hidden_dim < 1:
            raise ValueError(
                "A coupling flow needs 2 layers or more, which move the two halves of the coordinates in turn, and a "
                f"hidden unit; got num_layers={self.num_layers!r} and hidden_dim={self.hidden_dim!r}."
            )

    def start(self, batch: int, dim: int, device: torch.device) -> Parameters:
        if dim < 2:
            raise ValueError(
                f"A coupling flow moves one half of the coordinates given the other and needs 2 or more; the latents "
                f"of this pair have {dim}. Use DiagonalNormal()."
            )
        parameters = DiagonalNormal().start(batch, dim, device)
        for layer in range(self.num_layers):
            kept, moved = (len(range(dim)[half]) for half in _halves(layer, dim))
            # The one random choice, the same for all data; the rest is zero, which makes the layer the identity.
            weight = torch.randn(self.hidden_dim, kept, dtype=torch.float64, device=device) * sqrt(kept)
            shapes = {"bias": (self.hidden_dim,), "out_weight": (2 * moved, self.hidden_dim), "out_bias": (2 * moved,)}
            parameters[f"{layer}.weight"] = weight.repeat(batch, 1, 1)
            for name, shape in shapes.items():
                parameters[f"{layer}.{name}"] = weight.new_zeros(batch, *shape)
        return parameters

    def forward(self, parameters: Parameters, noise: Tensor) -> tuple[Tensor, Tensor]:
        log_det: Tensor | float = 0.0
        for layer in range(self.num_layers):
            kept, moved = _halves(layer, noise.shape[-1])
            shift, log_scale = self._affine(parameters, layer, noise[..., kept])
            noise = _joined(layer, noise[..., kept], noise[..., moved] * log_scale.exp() + shift)
            log_det = log_det + log_scale.sum(-1)
        v, last = DiagonalNormal().forward(parameters, noise)
        return v, log_det + last

    def inverse(self, parameters: Parameters, v: Tensor) -> tuple[Tensor, Tensor]:
        noise, log_det = DiagonalNormal().inverse(parameters, v)
        for layer in reversed(range(self.num_layers)):
            kept, moved = _halves(layer, v.shape[-1])
            shift, log_scale = self._affine(parameters, layer, noise[..., kept])
            noise = _joined(layer, noise[..., kept], (noise[..., moved] - shift) * (-log_scale).exp())
            log_det = log_det + log_scale.sum(-1)
        return noise, log_det

    def _affine(self, parameters: Parameters, layer: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log scale of the other half."""
        weight, bias, out_weight, out_bias = (
            parameters[f"{layer}.{name}"] for name in ("weight", "bias", "out_weight", "out_bias")
        )
        # Means, not sums, over what comes in: one step of Adam then moves an output no further than it moves loc.
        hidden = silu(torch.einsum("bhi,sbi->sbh", weight, kept) / kept.shape[-1] + bias)
        out = torch.einsum("boh,sbh->sbo", out_weight, hidden) / self.hidden_dim + out_bias
        shift, raw = out.chunk(2, -1)
        return shift, MOST_LOG_SCALE * (raw / MOST_LOG_SCALE).tanh()


def _halves(layer: int, dim: int) -> tuple[slice, slice]:
    """Which coordinates a layer keeps, and which it moves."""
    first, second = slice(0, dim // 2), slice(dim // 2, dim)
    return (second, first) if layer % 2 else (first, second)


def _joined(layer: int, kept: Tensor, moved: Tensor) -> Tensor:
    """Both halves in their places."""
    return torch.cat([moved, kept] if layer % 2 else [kept, moved], -1)


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * (noise.square() + log(2 * pi)).sum(-1)
