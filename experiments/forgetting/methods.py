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
    share: float = 1.0
    """Multiple of the rows that a step of the task may change, where it selects."""

    def train_config(self, rate: float, base: TrainConfig, slots: int, background: str) -> TrainConfig:
        """Returns the settings of a run.

        Args:
            rate: peak of the learning rate.
            base: steps, batch and seed.
            slots: rows of a table that a step may change, where it selects.
            background: path of the background reads.
        """
        selection: dict[str, Any] = {}
        if self.selects:
            compares = self.settings.get("slot_score") != "reads"
            selection = dict(slots_per_step=round(self.share * slots), background=background * compares)
        return replace(base, learning_rate=rate, **self.settings, **selection)


SPARSE = Method("sparse memory, AdamW", dict(trainable=_ROWS), selects=True)
METHODS = (
    SPARSE,
    Method("sparse memory, SGD", dict(trainable=_ROWS, row_optimizer="sgd"), selects=True),
    Method("full memory", dict(trainable=_ROWS)),
    Method(
        "LoRA",
        dict(trainable="^lora/", lora_rank=32, lora_alpha=32.0, lora_targets="(attention|feed_forward)/w_"),
    ),
    Method("full fine-tuning", dict(trainable="")),
)
"""Methods that are compared at equal learning."""
VARIANTS = (
    replace(SPARSE, name="an eighth of the rows", share=1 / 8),
    replace(SPARSE, name="half of the rows", share=1 / 2),
    replace(SPARSE, name="twice the rows", share=2),
    replace(SPARSE, name="KL divergence", settings=SPARSE.settings | dict(slot_score="kl")),
    replace(SPARSE, name="most read rows", settings=SPARSE.settings | dict(slot_score="reads")),
)
"""Variants of `SPARSE`, at its learning rate."""
