"""What all objectives have in common: a loss to lower, and beside it the bound at weight 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from torch import Tensor

from ppl_vae.objectives.looking import Looks, looked_at
from ppl_vae.scoring import Pair, Program, Sites, Values


class Terms(NamedTuple):
    """What one look at a batch gives.

    Attributes:
        loss: to be lowered, a number with a gradient; summed over the batch, and times N / B where the plate over
            the data is subsampled.
        bound: the lower bound of log p(x) at weight 1, without a gradient, `(batch,)`, in nats per datum.
    """

    loss: Tensor
    bound: Tensor


class Objective(ELBO):
    """A Pyro `ELBO` for pairs with a log weight per datum; see the room's docstring for what there is.

    It serves `pyro.infer.SVI(model, guide, optimiser, objective)`, `objective(model, guide)`, which is a module whose
    value is the loss, and `fit`. What has no log weight per datum is refused in a sentence, as by `log_weights`.

    Attributes:
        progress: the share of training done, from 0 to 1, for objectives with a schedule. `fit` sets it; so must a
            loop of your own.
    """

    progress: float | None = None

    def __init__(self, *, num_particles: int = 1) -> None:
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles must be an integer of at least 1; got {num_particles!r}.")
        super().__init__(num_particles=num_particles)
        self._looks = Looks()
        self._recorded: tuple[Tensor, ...] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"

    def terms(self, model: Program, guide: Program, *args: Any) -> Terms:
        """The loss to lower and the bound at weight 1, at fresh draws from the guide.

        Raises:
            ValueError: when the pair has no log weight per datum, or its guide has draws without a gradient where the
                objective needs one; with the site's name.
        """
        found = self._looks(self._terms, model, guide, args)
        self.check(found)
        return found

    def pair(self, model: Program, guide: Program, *args: Any) -> Pair:
        """What `at` takes: the pair, looked at on these data."""
        return looked_at(model, guide, args)

    def at(self, pair: Pair, args: tuple[Any, ...], *numbers: Tensor) -> Terms:
        """The `terms` of a pair that was looked at, as tensor operations and nothing else, to be recorded.

        Args:
            numbers: the values of schedules, as tensors; see `numbers`.
        """
        self._recorded = numbers
        try:
            return self._terms(pair, args)
        finally:
            self._recorded = None

    def numbers(self) -> tuple[float, ...]:
        """The values of the objective's schedules at the share of training done."""
        return ()

    def _present(self) -> tuple[Any, ...]:
        return self.numbers() if self._recorded is None else self._recorded

    def check(self, found: Terms) -> None:
        """Says what a user should know of what was found."""

    def loss(self, model: Program, guide: Program, *args: Any) -> float:
        """The loss as a number, without a gradient."""
        with torch.no_grad():
            return self.terms(model, guide, *args).loss.item()

    def differentiable_loss(self, model: Program, guide: Program, *args: Any) -> Tensor:
        """The loss as a number with a gradient."""
        return self.terms(model, guide, *args).loss

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float:
        """The loss as a number; its gradient is added to that of every parameter."""
        loss = self.terms(model, guide, *args).loss
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _terms(self, pair: Pair, args: tuple[Any, ...]) -> Terms:
        raise NotImplementedError

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("The objectives of ppl_vae score pairs by ppl_vae.scoring, not by single traces.")

    def check_reparameterised(self, pair: Pair) -> None:
        """Refuses a guide through some of whose draws no gradient flows."""
        if pair.without_rsample:
            raise ValueError(
                f"No gradient flows through the draws of '{pair.without_rsample[0]}' (its distribution has no "
                f"rsample), so {type(self).__name__} would leave its part of the guide untrained. Use VIMCO, or sum "
                "the latent out with Pyro's TraceEnum_ELBO."
            )


def drawn(pair: Pair, args: tuple[Any, ...], num_samples: int) -> tuple[Sites, Values, Tensor]:
    """What the guide says of the data, draws from it in canonical form, and their log q `(num_samples, batch)`.

    One draw takes the same random numbers as one run of the guide does.
    """
    encoded = pair.encode(*args)
    if encoded and num_samples == 1:
        z = {name: pair.layout.canonical(name, site["value"].unsqueeze(0)) for name, site in encoded.items()}
        return encoded, z, pair.log_q(encoded, z, *args, num_samples=1)
    z, log_q = pair.draw(encoded, *args, num_samples=num_samples)
    return encoded, z, log_q


def scheduled(objective: Objective, name: str, value: float | Callable[[float], float]) -> float:
    """A number, or that of a schedule at the share of training done; not negative.

    Raises:
        ValueError: when it is negative or no number, or when nobody says how much of the training is done.
    """
    if callable(value):
        if objective.progress is None:
            raise ValueError(
                f"The {name} of {type(objective).__name__} is a function of the share of training done, which nothing "
                "says. Train with fit, or set objective.progress, from 0 to 1, before each step."
            )
        value = value(objective.progress)
    if not value >= 0:
        raise ValueError(f"{name} must be a number of at least 0; got {value!r}.")
    return float(value)
