"""What the priors have alike."""

from __future__ import annotations

from math import expm1, log

# softplus of it is 1, the scale that priors start with.
RAW_ONE = log(expm1(1.0))


def checked_count(name: str, value: int) -> int:
    """A number of things that is one."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")
    return value
