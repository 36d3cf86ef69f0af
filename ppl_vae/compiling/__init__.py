"""A tensor function over a pair recorded to one graph and compiled; eager, with a reason, where that cannot be.

`torch.compile` alone does not take a Pyro program: it breaks at the effect handlers. Here the handlers run as Python
while the tensor operations underneath are recorded, gradients among them, and what is compiled is their graph.

| file | holds |
|---|---|
| `recording` | a function as a graph, and what is refused because a graph would not do the same |
| `rewriting` | operations in other words, of which the compiler makes more |
| `ordering` | writes as early in the graph as they may be |
| `compiled` | `Compiled`: graphs by shape, and the eager function where there is none |
"""

from ppl_vae.compiling.compiled import Compiled
from ppl_vae.compiling.recording import NotCompiled, Outputs, Recording, recorded

__all__ = ["Compiled", "NotCompiled", "Outputs", "Recording", "recorded"]
