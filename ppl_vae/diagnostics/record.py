"""The diagnostics of a pair's latents: numbers per datum, their means, and what they say in words."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, nan, sqrt

import torch
from torch import Tensor

from ppl_vae.precision import Rounded

# Of the posterior mean over the data; a unit below it says nothing of x (Burda et al., 2016).
ACTIVE = 0.01

NAMES = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl")


@dataclass(frozen=True, eq=False, repr=False)
class Diagnostics(Rounded):
    """The two parts of the ELBO at weight 1, and how the latents are used. In nats, float64, `(N,)` unless said.

    Attributes:
        reconstruction: E log p(x given z) over z ~ q(z given x).
        kl: KL(q(z given x), p(z)), of a pair with several latents that of their joint.
        elbo: reconstruction − kl, by the same draws.
        kl_per_dimension: `(N, D)`, which sum to `kl`; None where a density does not factorise over dimensions. Of a
            latent that depends on others, its part log q − log p given those, which may be negative.
        unit_variance: `(D,)`, Var over the data of the posterior mean E[z_d given x] under q, in squared units of z.
        mutual_information: `(M,)`, E log q(z given x) / q(z) over z ~ q(z given x), q(z) being the mean of q(z given x)
            over M of the data. Its mean is I(x; z) of those data: the exact number for them, at most log M, and of the
            population that they are drawn from a lower bound in expectation.
        marginal_kl: `(M,)`, kl − mutual_information; its mean is KL(q(z), p(z)).
        standard_error: of each of `NAMES`, over other draws; 0 for a KL in closed form.
        dimensions: the names of the D latent numbers, such as "z[0]".
        is_closed: whether `kl` is in closed form; else it comes from the draws.
        num_samples: draws of z for each datum.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016 (active units).
        https://arxiv.org/abs/1509.00519
        Hoffman & Johnson, ELBO surgery, 2016 (the KL as mutual information and marginal KL).
        http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
        Poole, Ozair, van den Oord, Alemi & Tucker, On Variational Bounds of Mutual Information, 2019 (why that of a
        sample is a lower bound). https://arxiv.org/abs/1905.06922
    """

    reconstruction: Tensor
    kl: Tensor
    elbo: Tensor
    kl_per_dimension: Tensor | None
    unit_variance: Tensor
    mutual_information: Tensor
    marginal_kl: Tensor
    standard_error: dict[str, Tensor]
    dimensions: list[str]
    is_closed: bool
    num_samples: int

    @property
    def active(self) -> Tensor:
        """Which latent dimensions are used, `(D,)`: those whose `unit_variance` is above 0.01."""
        return self.unit_variance > ACTIVE

    @property
    def num_active(self) -> int:
        """How many latent dimensions are used."""
        return int(self.active.sum())

    @property
    def mean(self) -> dict[str, float]:
        """Mean over the data of each of `NAMES`."""
        return {name: getattr(self, name).mean().item() for name in NAMES}

    @property
    def mean_standard_error(self) -> dict[str, float]:
        """Of `mean`, for other data and other draws: sd / √N. NaN for one datum."""

        def error(values: Tensor) -> float:
            return (values.std() / sqrt(len(values))).item() if len(values) > 1 else nan

        return {name: error(getattr(self, name)) for name in NAMES}

    @property
    def mc_standard_error(self) -> dict[str, float]:
        """Of `mean`, for the same data and other draws: √(Σ standard_error²) / N."""
        return {name: (error.square().sum().sqrt() / len(error)).item() for name, error in self.standard_error.items()}

    def summary(self) -> None:
        """Prints the means with their errors, and says in words what is wrong with the latents."""
        print(self)

    def __repr__(self) -> str:
        parts = f"reconstruction {self.mean['reconstruction']:.3f}, kl {self.mean['kl']:.3f}"
        return f"Diagnostics({parts}, {self.num_active} of {len(self.dimensions)} units active)"

    def __str__(self) -> str:
        words = {
            "elbo": ("ELBO", "reconstruction − KL"),
            "reconstruction": ("  reconstruction", "E log p(x given z) under q"),
            "kl": ("  KL", f"of q from the prior, {'in closed form' if self.is_closed else 'from the draws'}"),
            "mutual_information": ("    information", f"of z about x, at most {self._ceiling:.2f}"),
            "marginal_kl": ("    marginal KL", "of q averaged over the data from the prior"),
        }
        title = f"Latents: {len(self.kl)} data, {self.num_samples} samples each, in nats per datum"
        lines = [title, f"{'':<18}{'mean':>12}{'± samples':>12}{'± data':>12}"]
        for name, (label, meaning) in words.items():
            numbers = self.mean[name], self.mc_standard_error[name], self.mean_standard_error[name]
            cells = "".join(f"{'–' if number != number else f'{number:.4f}':>12}" for number in numbers)
            lines.append(f"{label:<18}{cells}  {meaning}")
        units = f"{self.num_active} of {len(self.dimensions)}"
        lines.append(f"{'active units':<18}{units:>12}  variance of the posterior mean over the data above {ACTIVE}")
        return "\n".join([*lines, self._split(), *(f"! {warning}" for warning in self.warnings())])

    def warnings(self) -> list[str]:
        """In sentences, what is wrong with the latents or with these numbers; empty when nothing is."""
        found = self._rounding()
        if len(self.kl) > 1 and self.num_active == 0:
            found.append(
                "No latent dimension is active: q(z given x) is the same for all data, and the decoder ignores z (a "
                "posterior collapse). Lower the learning rate, raise the weight of the KL slowly from 0 during "
                "training, or weaken the decoder."
            )
        if len(self.mutual_information) > 1 and self.mean["mutual_information"] > self._ceiling - 0.5:
            found.append(
                f"The mutual information is at its ceiling, the logarithm of the number of data ({self._ceiling:.2f}): "
                "every datum has its z to itself, and what z knows of x beyond that cannot be told. So neither can "
                "the marginal KL, of which the rest is an upper bound."
            )
        values = torch.stack([self.reconstruction, self.kl])
        if (bad := int((~values.isfinite()).any(0).sum())) > 0:
            found.append(f"{bad} of {len(self.kl)} data have a reconstruction or a KL that is not finite.")
        return found

    @property
    def _ceiling(self) -> float:
        return log(len(self.mutual_information))

    def _split(self) -> str:
        """A line on the KL of each dimension, the largest first."""
        if self.kl_per_dimension is None:
            return f"{'KL per dimension':<18}{'–':>12}  a density of the pair does not factorise over dimensions"
        kl = self.kl_per_dimension.mean(0)
        order = kl.argsort(descending=True).tolist()
        shown = "  ".join(f"{self.dimensions[d]} {kl[d]:.2f}" for d in order[:8])
        rest = len(order) - 8
        more = f"  and {rest} more, {sum(kl[d].item() for d in order[8:]):.2f} together" if rest > 0 else ""
        return f"{'KL per dimension':<18}{shown}{more}"
