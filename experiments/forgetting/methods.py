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
    rates: tuple[float, ...]
    """Learning rates among which the best is chosen, on other people."""
    needs_background: bool = False
    """Whether it compares its reads with background reads."""

    @property
    def is_sparse(self) -> bool:
        """Tells whether only some of the rows that a batch reads may change."""
        return "slots_per_step" in self.settings

    def train_config(self, rate: float, base: TrainConfig, background: str) -> TrainConfig:
        """Returns the settings of a run.

        Args:
            rate: peak of the learning rate.
            base: steps, batch and seed.
            background: path of the background reads.
        """
        counts: dict[str, Any] = {"background": background} if self.needs_background else {}
        return replace(base, learning_rate=rate, **self.settings, **counts)


def _sparse(name: str, slots: int, rates: tuple[float, ...], **settings: Any) -> Method:
    selection = dict(trainable=_ROWS, slots_per_step=slots)
    return Method(name, selection | settings, rates, needs_background=settings.get("slot_score") != "reads")


_SGD = dict(row_optimizer="sgd", weight_decay=0.0)

METHODS = (
    _sparse("sparse memory, AdamW", 64, (1e-3, 3e-3, 1e-2)),
    _sparse("sparse memory, SGD", 64, (3.0, 10.0, 30.0), **_SGD),
    Method("full memory", dict(trainable=_ROWS), (1e-3, 3e-3, 1e-2)),
    Method(
        "LoRA",
        dict(trainable="^lora/", lora_rank=8, lora_alpha=16.0, lora_targets=r"attention/w_(query|value)$"),
        (1e-3, 3e-3, 1e-2),
    ),
    Method("full fine-tuning", dict(trainable=""), (3e-5, 1e-4, 3e-4)),
)
"""Methods that are compared at equal learning."""
