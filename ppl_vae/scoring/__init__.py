"""Per-datum log weights log p(x, z) − log q(z given x) of any Pyro pair: the one primitive under every estimator.

A pair is two Pyro programs, `model(x, ...)` and `guide(x, ...)`, in whatever form: modules, bound methods or plain
functions. `Pair` runs them once on a few data, refuses in a sentence what has no log weight per datum, and finds out
how many samples can be scored in one run. After that its methods are tensor operations under Pyro's handlers: no
inspection and no Python that depends on values, so that they can be recorded into one graph.

Shapes: samples first, data second. A latent in canonical form is `(num_samples, *plates, *event)`, `plates` having one
dimension for each of the pair's `nesting` levels of plates.
"""

from ppl_vae.scoring.data import as_tuple, check_data, is_dataset, rows, widened
from ppl_vae.scoring.inspection import data_plates
from ppl_vae.scoring.pair import PROBE_DATA, Pair, log_weights
from ppl_vae.scoring.running import Program, Sites, Values, log_probs, loop, particles, run, scored_sites, tiles
from ppl_vae.scoring.supports import inside
from ppl_vae.scoring.target import Target

__all__ = [
    "PROBE_DATA",
    "Pair",
    "Program",
    "Sites",
    "Target",
    "Values",
    "as_tuple",
    "check_data",
    "data_plates",
    "inside",
    "is_dataset",
    "log_probs",
    "log_weights",
    "loop",
    "particles",
    "rows",
    "run",
    "scored_sites",
    "tiles",
    "widened",
]
