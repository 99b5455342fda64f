"""Lists the ways to teach a model new facts that are compared, as settings of a training run."""

from dataclasses import dataclass, replace
from typing import Any

from ultramem_jax.config import TrainConfig

_ROWS = "/values$"
"""Values of tables; queries, keys and readouts stay as they are."""


@dataclass(frozen=True)
class Method:
    """Describes one way to teach a model."""

    name: str
    """Name in tables and figures."""
    settings: dict[str, Any]
    """Fields of `TrainConfig`."""
    selects: bool = False
    """Whether a step may change only some of the rows that its batch reads."""

    def train_config(self, rate: float, base: TrainConfig, slots: int, background: str) -> TrainConfig:
        """Returns the settings of a run.

        Args:
            rate: peak of the learning rate.
            base: steps, batch and seed.
            slots: rows of a table that a step may change, where it selects.
            background: path of the background reads.
        """
        selection: dict[str, Any] = dict(slots_per_step=slots, background=background) if self.selects else {}
        return replace(base, learning_rate=rate, **self.settings, **selection)


METHODS = (
    Method("sparse memory, AdamW", dict(trainable=_ROWS), selects=True),
    Method("sparse memory, SGD", dict(trainable=_ROWS, row_optimizer="sgd"), selects=True),
    Method("full memory", dict(trainable=_ROWS)),
    Method(
        "LoRA",
        dict(trainable="^lora/", lora_rank=8, lora_alpha=16.0, lora_targets=r"attention/w_(query|value)$"),
    ),
    Method("full fine-tuning", dict(trainable="")),
)
"""Methods that are compared at equal learning."""
