"""What `fit` lowers: `pyro.infer.ELBO`s whose value is a bound on log p, in nats."""

from ppl_vae.objectives.semi_supervised import SemiSupervisedELBO

__all__ = ["SemiSupervisedELBO"]
