"""What happened during `fit`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class History:
    """What happened during `fit`, in nats per datum.

    Attributes:
        loss: mean training loss of each epoch, the negative ELBO for `Trace_ELBO`.
        validation: loss on the validation data after each epoch; empty without them.
        stopped: why training ended: "finished", "early stopping", "time limit" or "interrupted".
        seconds: spent, before and after the run was resumed.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    stopped: str = "finished"
    seconds: float = 0.0

    def __repr__(self) -> str:
        if not self.loss:
            return f"History({self.stopped} before the first step)"
        text = f"loss {self.loss[-1]:.3f}"
        if self.validation:
            text += f", validation {self.validation[-1]:.3f}"
        return f"History({self.stopped} after {len(self.loss)} epochs, {self.seconds:.0f} s: {text} nats per datum)"
