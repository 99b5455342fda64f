"""The training loss that a record holds: the mean over all steps since the record before."""

import dataclasses

from ultramem_jax.training.evaluation import bits_per_byte


@dataclasses.dataclass
class LossWindow:
    """Sums over the steps since the last record. A checkpoint carries them over to the next process."""

    steps: int = 0
    nats: float = 0.0
    """Of a mean target of each step."""
    bytes: float = 0.0
    """Of a mean target of each step."""

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
