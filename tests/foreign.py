"""Pairs that this project did not write, small: built as the examples of Pyro are, for the tests of what takes a pair.

After the examples `vae`, `ss_vae_M2`, `cvae` and `dmm` and the tutorial on Bayesian regression of Pyro (Bingham et
al., 2019, https://pyro.ai/examples), with what is peculiar to each of them: networks called by `.forward`, a plate
without a size, shapes that depend on a mask, a loop over time, sequences of different lengths, weights as latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

# Sizes that are all different primes. Of 23 data, the last of three batches is shorter than the others.
NUM_DATA, BATCH_SIZE, LATENT_DIM, HIDDEN_DIM = 23, 11, 2, 13
HEIGHT, WIDTH, NUM_CLASSES = 5, 7, 3
PIXELS = HEIGHT * WIDTH
NUM_STEPS, NUM_NOTES, STATE_DIM = 2, 7, 3
NUM_FEATURES = 3


@dataclass(frozen=True)
class Foreign:
    """A pair and how its example trains it.

    Attributes:
        model: p.
        guide: q.
        data: what `fit` takes after them.
        objective: what is lowered.
        batch_size: of a step.
        without_gradient: how the names of the parameters begin that take no part in the loss.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    data: tuple[Any, ...]
    objective: ELBO
    batch_size: int = BATCH_SIZE
    without_gradient: tuple[str, ...] = ()


def images(seed: int = 3) -> Tensor:
    """Binary images `(data, 1, height, width)` of a few bright rows each, so that there is something to learn."""
    g = torch.Generator().manual_seed(seed)
    bright = torch.rand(NUM_DATA, 1, HEIGHT, 1, generator=g) < 0.4
    return (torch.rand(NUM_DATA, 1, HEIGHT, WIDTH, generator=g) < torch.where(bright, 0.95, 0.05)).float()


# The VAE.


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(PIXELS, HIDDEN_DIM)
        self.loc = nn.Linear(HIDDEN_DIM, LATENT_DIM)
        self.log_scale = nn.Linear(HIDDEN_DIM, LATENT_DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = nn.functional.softplus(self.hidden(x.reshape(-1, PIXELS)))
        return self.loc(h), self.log_scale(h).exp()


class VAE(nn.Module):
    """Networks that are called by `.forward`, which no hook sees, and probabilities in place of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = nn.Sequential(
            nn.Linear(LATENT_DIM, HIDDEN_DIM), nn.Softplus(), nn.Linear(HIDDEN_DIM, PIXELS), nn.Sigmoid()
        )

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            prior = dist.Normal(x.new_zeros(x.shape[0], LATENT_DIM), x.new_ones(x.shape[0], LATENT_DIM))
            z = pyro.sample("latent", prior.to_event(1))
            mean = self.decoder.forward(z)
            pyro.sample("obs", dist.Bernoulli(mean, validate_args=False).to_event(1), obs=x.reshape(-1, PIXELS))
            return mean

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", dist.Normal(*self.encoder.forward(x)).to_event(1))


def vae() -> Foreign:
    pair = VAE()
    return Foreign(pair.model, pair.guide, (images(),), Trace_ELBO())


# The semi-supervised VAE: two kinds of batches.


class OfSeveral(nn.Module):
    """A network of several inputs, which may have been given more dimensions on the left by an enumeration."""

    def __init__(self, in_dim: int, out_dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(in_dim, HIDDEN_DIM), nn.Softplus(), nn.Linear(HIDDEN_DIM, out_dim), activation
        )

    def forward(self, *parts: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return self.network(torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1))


class SemiSupervisedVAE(nn.Module):
    """Classes as one-hot vectors, in a plate that is not told how many data there are."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = OfSeveral(PIXELS, NUM_CLASSES, nn.Softmax(-1))
        self.encoder = OfSeveral(PIXELS + NUM_CLASSES, 2 * LATENT_DIM, nn.Identity())
        self.decoder = OfSeveral(LATENT_DIM + NUM_CLASSES, PIXELS, nn.Sigmoid())

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        pyro.module("semi_supervised", self)
        with pyro.plate("data"):
            prior = dist.Normal(x.new_zeros(len(x), LATENT_DIM), x.new_ones(len(x), LATENT_DIM))
            z = pyro.sample("z", prior.to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), NUM_CLASSES) / NUM_CLASSES), obs=y)
            mean = self.decoder(z, y)
            pyro.sample("x", dist.Bernoulli(mean, validate_args=False).to_event(1), obs=x)
            return mean

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(self.classifier(x)))
            loc, log_scale = self.encoder(x, y).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def semi_supervised(*data: Any, without_gradient: tuple[str, ...] = ()) -> Foreign:
    pair = SemiSupervisedVAE()
    objective = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    guide = config_enumerate(pair.guide, "parallel", expand=True)
    return Foreign(pair.model, guide, data, objective, without_gradient=without_gradient)


def classes() -> Tensor:
    return nn.functional.one_hot(torch.arange(NUM_DATA) % NUM_CLASSES, NUM_CLASSES).float()


def supervised() -> Foreign:
    return semi_supervised(images().flatten(1), classes(), without_gradient=("classifier",))


def unsupervised() -> Foreign:
    return semi_supervised(images().flatten(1))


def supervised_now_and_then() -> Foreign:
    """As the example trains: most batches come without classes, and a few with them."""
    x, y = (part.split(BATCH_SIZE) for part in (images().flatten(1), classes()))
    return semi_supervised(DataLoader([(x[0],), (x[1], y[1]), (x[2],)], batch_size=None))


# The conditional VAE: one quadrant of an image is given, the others are to be filled in.


class CVAE(nn.Module):
    """A recurrent connection: a deterministic guess, trained before and not any more, is what the prior sees."""

    def __init__(self) -> None:
        super().__init__()
        self.guess = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN_DIM), nn.ReLU(), nn.Linear(HIDDEN_DIM, PIXELS), nn.Sigmoid()
        )
        self.prior, self.recognition = Encoder(), Encoder()
        self.generation = nn.Sequential(
            nn.Linear(LATENT_DIM, HIDDEN_DIM), nn.ReLU(), nn.Linear(HIDDEN_DIM, PIXELS), nn.Sigmoid()
        )

    @staticmethod
    def filled(x: Tensor, y: Tensor) -> Tensor:
        """One image of what is given and what is not, written into a copy in place."""
        whole = x.clone()
        whole[x == -1] = y[x == -1]
        return whole

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        pyro.module("conditional", self)
        with pyro.plate("data"):
            with torch.no_grad():
                guess = self.guess(x.reshape(-1, PIXELS)).view(x.shape)
            z = pyro.sample("z", dist.Normal(*self.prior(self.filled(x, guess))).to_event(1))
            mean = self.generation(z)
            if y is None:
                pyro.deterministic("y", mean.detach())
            else:
                missing = mean[(x == -1).view(-1, PIXELS)].view(len(x), -1)
                p = dist.Bernoulli(missing, validate_args=False).to_event(1)
                pyro.sample("y", p, obs=y[x == -1].view(len(x), -1))
            return mean

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if y is None:
                loc, scale = self.prior(self.filled(x, self.guess(x.reshape(-1, PIXELS)).view(x.shape)))
            else:
                loc, scale = self.recognition(self.filled(x, y))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def cvae() -> Foreign:
    x, y, pair = images(), images(), CVAE()
    y[..., HEIGHT // 2 :, : WIDTH // 2] = -1
    x[y != -1] = -1
    return Foreign(pair.model, pair.guide, (x, y), Trace_ELBO(), without_gradient=("guess",))


# The deep Markov model: one latent for each step of time, and a guide that reads the future.


class DeepMarkovModel(nn.Module):
    """p(z_t given z_{t−1}) p(x_t given z_t), with a latent for each time, and masks where a sequence has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.emission = nn.Sequential(
            nn.Linear(STATE_DIM, HIDDEN_DIM), nn.ReLU(), nn.Linear(HIDDEN_DIM, NUM_NOTES), nn.Sigmoid()
        )
        self.gate = nn.Sequential(
            nn.Linear(STATE_DIM, HIDDEN_DIM), nn.ReLU(), nn.Linear(HIDDEN_DIM, STATE_DIM), nn.Sigmoid()
        )
        self.proposed = nn.Sequential(nn.Linear(STATE_DIM, HIDDEN_DIM), nn.ReLU(), nn.Linear(HIDDEN_DIM, STATE_DIM))
        self.kept = nn.Linear(STATE_DIM, STATE_DIM)
        self.scale = nn.Linear(STATE_DIM, STATE_DIM)
        nn.init.eye_(self.kept.weight)
        nn.init.zeros_(self.kept.bias)
        self.rnn = nn.RNN(NUM_NOTES, HIDDEN_DIM, nonlinearity="relu", batch_first=True)
        self.to_hidden = nn.Linear(STATE_DIM, HIDDEN_DIM)
        self.to_loc, self.to_scale = nn.Linear(HIDDEN_DIM, STATE_DIM), nn.Linear(HIDDEN_DIM, STATE_DIM)
        self.start, self.guide_start = nn.Parameter(torch.zeros(STATE_DIM)), nn.Parameter(torch.zeros(STATE_DIM))
        self.rnn_start = nn.Parameter(torch.zeros(1, 1, HIDDEN_DIM))

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate, proposed = self.gate(z), self.proposed(z)
        return (1 - gate) * self.kept(z) + gate * proposed, nn.functional.softplus(self.scale(proposed.relu()))

    def futures(self, reversed_x: Tensor | PackedSequence, lengths: Tensor, num_steps: int) -> Tensor:
        """What the network has read of x_T, ..., x_t, at each t: `(batch, time, hidden)`."""
        start = self.rnn_start.expand(1, len(lengths), HIDDEN_DIM).contiguous()
        output, _ = self.rnn(reversed_x, start)
        if isinstance(output, PackedSequence):
            output, _ = pad_packed_sequence(output, batch_first=True, total_length=num_steps)
        return time_reversed(output, lengths)

    def model(
        self,
        x: Tensor,
        reversed_x: Tensor | PackedSequence,
        mask: Tensor,
        lengths: Tensor,
        annealing: float = 1.0,
    ) -> None:
        pyro.module("markov", self)
        z = self.start.expand(len(x), STATE_DIM)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                present = mask[:, t : t + 1]
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(*self.transition(z)).mask(present).to_event(1))
                pyro.sample(f"x_{t}", dist.Bernoulli(self.emission(z)).mask(present).to_event(1), obs=x[:, t])

    def guide(
        self,
        x: Tensor,
        reversed_x: Tensor | PackedSequence,
        mask: Tensor,
        lengths: Tensor,
        annealing: float = 1.0,
    ) -> None:
        pyro.module("markov", self)
        futures = self.futures(reversed_x, lengths, x.shape[1])
        z = self.guide_start.expand(len(x), STATE_DIM)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                h = (self.to_hidden(z).tanh() + futures[:, t]) / 2
                q = dist.Normal(self.to_loc(h), nn.functional.softplus(self.to_scale(h)))
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", q.mask(mask[:, t : t + 1]).to_event(1))


def time_reversed(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence `(batch, time, ...)` from its own end to its start; what follows is of no meaning."""
    steps = (lengths.unsqueeze(-1) - 1 - torch.arange(x.shape[1])).clamp(min=0)
    return x.gather(1, steps.unsqueeze(-1).expand_as(x))


def sequences() -> tuple[Tensor, Tensor, Tensor]:
    """Notes held for a while `(data, time, notes)`, masks `(data, time)` and lengths `(data,)`."""
    g = torch.Generator().manual_seed(5)
    held = torch.rand(NUM_DATA, 1, NUM_NOTES, generator=g) < 0.3
    x = (torch.rand(NUM_DATA, NUM_STEPS, NUM_NOTES, generator=g) < torch.where(held, 0.95, 0.05)).float()
    lengths = 1 + torch.arange(NUM_DATA) % NUM_STEPS
    mask = torch.arange(NUM_STEPS) < lengths.unsqueeze(-1)
    return x * mask.unsqueeze(-1), mask, lengths


def deep_markov() -> Foreign:
    """All sequences padded to the longest, so that every batch has the same latents."""
    (x, mask, lengths), pair = sequences(), DeepMarkovModel()
    return Foreign(pair.model, pair.guide, (x, time_reversed(x, lengths), mask, lengths), Trace_ELBO())


def deep_markov_packed() -> Foreign:
    """As the example trains: packed sequences, as many latents as a batch is long, and a KL that is warmed up."""
    x, mask, lengths = sequences()
    batches, pair = [], DeepMarkovModel()
    for index, annealing in zip(lengths.sort().indices.split(BATCH_SIZE), (0.3, 0.7, 1.0), strict=True):
        index = index.flip(0)  # packing wants the longest first
        longest = int(lengths[index[0]])
        reversed_x = time_reversed(x[index], lengths[index])
        packed = pack_padded_sequence(reversed_x, lengths[index], batch_first=True)
        batches.append((x[index, :longest], packed, mask[index, :longest], lengths[index], annealing))
    return Foreign(pair.model, pair.guide, (DataLoader(batches, batch_size=None),), Trace_ELBO())


# Bayesian regression: nothing but global latents.


class Regression(PyroModule):
    """A linear layer whose weights are latent."""

    def __init__(self, num_data: int | None = None) -> None:
        super().__init__()
        self.num_data = num_data  # where a batch is not all of them
        self.linear = PyroModule[nn.Linear](NUM_FEATURES, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, NUM_FEATURES]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", self.num_data or len(x), subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def regression(*, batch_size: int = NUM_DATA, num_data: int | None = None) -> Foreign:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(NUM_DATA, NUM_FEATURES, generator=g)
    y = x @ torch.tensor([1.5, -0.5, 0.3]) + 2 + 0.3 * torch.randn(NUM_DATA, generator=g)
    model = Regression(num_data)
    return Foreign(model, AutoNormal(model), (x, y), Trace_ELBO(), batch_size=batch_size)


PAIRS: dict[str, Callable[[], Foreign]] = {
    pair.__name__: pair
    for pair in (
        vae,
        supervised,
        unsupervised,
        supervised_now_and_then,
        cvae,
        deep_markov,
        deep_markov_packed,
        regression,
    )
}
