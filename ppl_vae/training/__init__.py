"""Training any Pyro pair by stochastic variational inference: `fit` and its `History`.

| file | holds |
|---|---|
| `fitting` | `fit`: the loop over epochs, learning rate, early stopping |
| `steps` | one step of a pair and an objective, and everything that is refused in words |
| `checkpoints` | a run between two epochs, on disk: enough to continue as if it had never stopped |
| `history` | `History` |
"""

from ppl_vae.training.fitting import fit
from ppl_vae.training.history import History

__all__ = ["History", "fit"]
