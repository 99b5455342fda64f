"""Averages the training loss over the steps between two records."""

import dataclasses

from ultramem_jax.training.evaluation import bits_per_byte


@dataclasses.dataclass
class LossWindow:
    """Sums losses over the steps since the last record. A checkpoint carries them to the next process."""

    steps: int = 0
    nats: float = 0.0
    """The sum of each step's mean loss per target."""
    bytes: float = 0.0
    """The sum of each step's mean bytes of text per target."""

    @classmethod
    def of(cls, saved: dict[str, float]) -> "LossWindow":
        """Returns the window that `dataclasses.asdict` made these of; an empty one of an empty dict."""
        return cls(int(saved.get("steps", 0)), float(saved.get("nats", 0)), float(saved.get("bytes", 0)))

    def add(self, loss: float, target_bytes: float) -> None:
        """Takes a step of this loss, in nats per token, and this many bytes of text per target."""
        self.steps += 1
        self.nats += loss
        self.bytes += target_bytes

    def take(self) -> dict[str, float]:
        """Returns `loss`, in nats per token, and `bits_per_byte` over the steps, and begins anew."""
        means = {"loss": self.nats / self.steps, "bits_per_byte": bits_per_byte(self.nats, self.bytes)}
        self.steps, self.nats, self.bytes = 0, 0.0, 0.0
        return means
