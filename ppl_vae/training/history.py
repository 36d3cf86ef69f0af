"""What happened during `fit`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class History:
    """What happened during `fit`, in nats per datum.

    Attributes:
        loss: mean of what was lowered in each epoch, the negative ELBO for `Trace_ELBO`.
        validation: minus the `bound` on the validation data after each epoch, which goes down; empty without them.
        stopped: why training ended: "finished", "early stopping", "time limit" or "interrupted".
        seconds: spent, before and after the run was resumed.
        bound: mean lower bound of log p(x) in each epoch, which goes up: at weight 1 whatever an objective of
            `ppl_vae.objectives` does to the KL; minus the loss for one of Pyro's.
        rounded_to: to what the programs round, such as "bfloat16", inside of `torch.autocast` or by the type of their
            weights; None for not at all.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    stopped: str = "finished"
    seconds: float = 0.0
    bound: list[float] = field(default_factory=list)
    rounded_to: str | None = None

    def add(self, loss: float, bound: float) -> None:
        """The means of one more epoch."""
        self.loss.append(loss)
        self.bound.append(bound)

    def __repr__(self) -> str:
        if not self.loss:
            return f"History({self.stopped} before the first step)"
        text = f"loss {self.loss[-1]:.3f}"
        if self.bound and self.bound[-1] != -self.loss[-1]:
            text += f", bound {self.bound[-1]:.3f}"
        if self.validation:
            text += f", validation {self.validation[-1]:.3f}"
        text += f" nats per datum{f', in {self.rounded_to}' if self.rounded_to else ''}"
        return f"History({self.stopped} after {len(self.loss)} epochs, {self.seconds:.0f} s: {text})"
