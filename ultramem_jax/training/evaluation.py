"""The loss of a model over a split of a corpus, token by token or through a sliding window."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ultramem_jax.config import RunConfig
from ultramem_jax.data import Corpus, eval_batches
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.distributed import is_first
from ultramem_jax.parallel.mesh import one_device, rows_here, shard_batch
from ultramem_jax.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model makes of the text that was evaluated."""

    loss: float
    """Mean over targets, in nats per token."""
    bits_per_byte: float
    tokens: int
    """Targets that the loss is the mean of."""

    @property
    def perplexity(self) -> float:
        """Per token, so that only models of one tokenizer compare by it; infinite where float64 ends."""
        return math.inf if self.loss > 709 else math.exp(self.loss)


class Evaluator:
    """The mean loss over a split, on the same batches each time.

    On a mesh each batch is split over the devices as those of training are; all processes call it together.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, axes: MeshAxes | None = None):
        """For variables that lie on the mesh of `axes`; None is the first device of this process."""
        self._config, self._corpus = config, corpus
        self._axes = one_device() if axes is None else axes
        step = make_eval_step(config, self._axes)
        self._step = jax.jit(step, out_shardings=self._axes.sharding())

    def __call__(
        self,
        variables: dict[str, Any],
        split: str = "validation",
        batches: int | None = None,
        *,
        stride: int | None = None,
        progress: bool = False,
    ) -> Evaluation:
        """The loss of the model on a split.

        Args:
            variables: of the model.
            split: `train`, `validation` or `test`.
            batches: how many; 0 is all of the split, None is `train.eval_batches`. Their sequences are spread
                evenly over the split.
            stride: tokens from the beginning of a sequence to that of the next, in [1, S]; None is S,
                disjoint sequences as in training. Below S they overlap: of each but the first only the last
                `stride` targets count, with at least S - `stride` tokens of context, and none counts twice.
            progress: whether to draw a progress bar on standard error.

        Raises:
            UserError: see `eval_batches`.
        """
        size = self._config.train.batch_size
        limit = self._config.train.eval_batches if batches is None else batches
        rows = rows_here(self._axes, size)
        total = np.zeros(2, np.float64)
        for batch in tqdm(
            eval_batches(self._corpus, split, size, limit, rows, stride),
            desc=split,
            unit="batch",
            disable=not (progress and is_first()),
            leave=False,
        ):
            tokens, mask = (shard_batch(batch[name], self._axes, size) for name in ("tokens", "mask"))
            total += np.asarray(self._step(variables, tokens, mask), np.float64)
        loss = float(total[0] / total[1])
        bits = bits_per_byte(loss, self._corpus.bytes_per_token(split))
        return Evaluation(loss=loss, bits_per_byte=bits, tokens=round(total[1]))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of text."""
    return loss / math.log(2) / bytes_per_token
