"""Averages the training loss over the steps between two records."""

import dataclasses

from ultramem_jax.training.evaluation import bits_per_byte


@dataclasses.dataclass
class LossWindow:
    """Sums losses over the steps since the last record. A checkpoint carries the sums to the next process."""

    steps: int = 0
    nats: float = 0.0
    """Sum over the steps of the mean loss per target, in nats."""
    bytes: float = 0.0
    """Sum over the steps of the mean bytes of text per target."""

    @classmethod
    def of(cls, saved: dict[str, float]) -> "LossWindow":
        """Returns the window from what `dataclasses.asdict` made of it.

        An empty dict gives an empty window.
        """
        return cls(int(saved.get("steps", 0)), float(saved.get("nats", 0)), float(saved.get("bytes", 0)))

    def add(self, loss: float, target_bytes: float) -> None:
        """Adds a step with this loss, in nats per token, and this many bytes of text per target."""
        self.steps += 1
        self.nats += loss
        self.bytes += target_bytes

    def take(self) -> dict[str, float]:
        """Returns `loss`, in nats per token, and `bits_per_byte` over the steps, and starts a new window."""
        means = {"loss": self.nats / self.steps, "bits_per_byte": bits_per_byte(self.nats, self.bytes)}
        self.steps, self.nats, self.bytes = 0, 0.0, 0.0
        return means
