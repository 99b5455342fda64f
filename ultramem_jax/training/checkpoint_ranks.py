"""Ranks checkpoints by validation loss, and says which of them are kept."""

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orbax.checkpoint as ocp

from ultramem_jax.files import replace_text

log = logging.getLogger(__name__)

LOSSES_FILE = "validation_losses.json"
"""Name of the file beside the checkpoints that holds validation losses by step. A run saves first and then
evaluates, so that a failed evaluation loses no step. When the checkpoint is written, its loss is not known
yet."""


def read_losses(directory: Path) -> dict[int, float] | None:
    """Returns the validation losses by step that `write_losses` wrote; None where they cannot be read."""
    path = directory / LOSSES_FILE
    if not path.exists():
        return {}
    try:
        return {int(step): float(loss) for step, loss in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        log.warning("%s cannot be read (%s): no checkpoint is known as the best", path, error)
        return None


def write_losses(directory: Path, losses: dict[int, float], steps: Iterable[int]) -> None:
    """Writes the validation losses of those `steps` whose loss is known.

    Raises:
        OSError: the system refuses.
    """
    known = {str(step): losses[step] for step in sorted(set(steps)) if step in losses}
    replace_text(directory / LOSSES_FILE, json.dumps(known))


def by_loss(losses: dict[int, float], steps: Sequence[int]) -> list[int]:
    """Returns the steps that have a finite loss, best first, and the newer of equals first."""
    ranked = [step for step in steps if math.isfinite(losses.get(step, math.nan))]
    return sorted(ranked, key=lambda step: (losses[step], -step))


@dataclass
class NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest and the best checkpoints.

    It works like Orbax's `AnyPreservationPolicy` of `LatestN` and `BestN`, except in two points. `BestN`
    keeps everything while there are no more than n checkpoints in all, ranked or not. And its order is
    undefined when a loss is NaN.
    """

    keep_last: int
    keep_best: int
    losses: dict[int, float]
    """Validation losses by step. `Checkpoints` shares this dict and fills it."""
    unknown: frozenset[int] = frozenset()
    """Steps whose losses are lost. They are kept, because the best may be among them."""

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        """Returns for each checkpoint whether it is kept."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self.kept(steps)
        return [step in kept for step in steps]

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Returns those of `steps` that are kept."""
        best = by_loss(self.losses, steps)[: self.keep_best]
        return {*sorted(steps)[-self.keep_last :], *best, *self.unknown.intersection(steps)}
