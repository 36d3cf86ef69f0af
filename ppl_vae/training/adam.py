"""The step of Adam as tensor operations, to be a part of a graph."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ppl_vae.compiling import NotCompiled
from ppl_vae.parameters import Parameters


def can_be_updated(parameters: Parameters) -> bool:
    """Whether a graph may do the step: for real numbers on a processor, each parameter in memory of its own.

    Of two in one memory the optimiser updates one after the other, and a graph would lose one of the two updates.
    """
    places = {p.untyped_storage().data_ptr() for p in parameters.values()}
    plain = all(p.device.type == "cpu" and p.is_floating_point() for p in parameters.values())
    return plain and len(places) == len(parameters)


class Update:
    """The step that an optimiser of torch's would do, in its own tensors.

    Args:
        optimizer: Adam, of one group.
        parameters: that it updates, by name, in its order.
        clip_norm: the largest norm of the gradient.

    References:
        Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015. https://arxiv.org/abs/1412.6980
    """

    def __init__(self, optimizer: torch.optim.Adam, parameters: Parameters, clip_norm: float | None) -> None:
        self.optimizer, self.parameters, self.clip_norm = optimizer, parameters, clip_norm
        self.places = {name: place for place, name in enumerate(parameters)}
        self._factors = torch.empty(len(parameters), 2, dtype=next(iter(parameters.values())).dtype)
        # The number t of the next step for each parameter, once it is known.
        self._counts: np.ndarray | None = None

    def state(self) -> list[Tensor]:
        """All tensors that it writes to."""
        return [t for p, moments in self.optimizer.state.items() for t in (p, *moments.values())]

    def factors(self) -> Tensor:
        """What this step comes to, for each parameter: its size α / (1 − β₁ᵗ), and √(1 − β₂ᵗ).

        An input of the graph, and always the same tensor; with a dozen numbers NumPy is faster than torch.
        """
        (group,), moments = self.optimizer.param_groups, self.optimizer.state
        if self._counts is None:
            steps = [moments[p]["step"].item() if p in moments else 0.0 for p in self.parameters.values()]
            self._counts = 1 + np.array(steps)
        beta1, beta2 = group["betas"]
        factors = self._factors.numpy()
        factors[:, 0] = group["lr"] / (1 - beta1**self._counts)
        factors[:, 1] = np.sqrt(1 - beta2**self._counts)
        return self._factors

    def written(self, name: str, g: Tensor, fine: Tensor, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The tensors of a parameter, each with what becomes of it where all is `fine` and the gradient finite."""
        p, moments = self.parameters[name], self.optimizer.state.get(self.parameters[name])
        if moments is None:
            raise NotCompiled(f"{name} had no gradient in the first step")
        (group,), (size, root) = self.optimizer.param_groups, factors[self.places[name]]
        (beta1, beta2), m, v = group["betas"], moments["exp_avg"], moments["exp_avg_sq"]
        m_next = m + (1 - beta1) * (g - m)
        v_next = beta2 * v + (1 - beta2) * g * g
        p_next = p - size * m_next / (v_next.sqrt() / root + group["eps"])
        sound = fine & g.isfinite()
        pairs = [(old, torch.where(sound, new, old)) for old, new in ((m, m_next), (v, v_next), (p, p_next))]
        return [*pairs, (moments["step"], moments["step"] + fine)]

    def done(self, names: Iterable[str]) -> None:
        """Says which parameters the graph has given this step."""
        if self._counts is not None:
            self._counts[[self.places[name] for name in names]] += 1

    def done_without(self) -> None:
        """Says that the optimiser is to do this step itself."""
        self._counts = None
