"""Every test starts from, and must leave behind, the same global state."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.infer.util
import pytest
import torch

from ppl_vae.compiling import compiled

matplotlib.use("agg")
# The tests' networks are too small to share: two threads would mostly wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Empties the parameter store, seeds every generator, and fails a test that leaves a global switch turned."""
    pyro.clear_param_store()
    pyro.set_rng_seed(20)
    switches = _switches()
    yield
    after = _switches()
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    pyro.enable_validation(__debug__)
    assert after == switches, f"the test changed global state from {switches} to {after}"


def _switches() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "distribution validation": torch.distributions.Distribution._validate_args,
        "inference validation": pyro.infer.util.is_validation_enabled(),
        "poutine validation": pyro.poutine.util.is_validation_enabled(),
        "module hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "threads": torch.get_num_threads(),
        "matrix products": torch.get_float32_matmul_precision(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
    }


def _numpy_state() -> list[int]:
    return np.random.get_state()[1].tolist()  # noqa: NPY002 - the legacy global state is what is guarded


@pytest.fixture
def rng_unchanged() -> Iterator[None]:
    """Fails a test that moves torch's, NumPy's or Python's global random state."""
    before = torch.get_rng_state(), _numpy_state(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert _numpy_state() == before[1]
    assert random.getstate() == before[2]


@pytest.fixture
def graphs_as_recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs run as they were recorded, without a compiler, which takes seconds; the list of those that were built."""
    built: list[Any] = []

    def as_it_is(graph: Any, inputs: Any, options: Any) -> Any:
        built.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", as_it_is)
    monkeypatch.setattr(compiled, "_PROGRAMS", OrderedDict())
    return built
