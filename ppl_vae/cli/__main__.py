"""`python -m ppl_vae.cli`, as `torchrun -m ppl_vae.cli` starts it."""

from __future__ import annotations

from ppl_vae.cli import main

main()
