"""Computes the loss of a model over a split of a corpus, in disjoint sequences or in a sliding window."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from ultramem_jax.config import RunConfig
from ultramem_jax.data import Corpus, Tokenizer, eval_batches
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.distributed import is_first
from ultramem_jax.parallel.mesh import one_device, rows_here, shard_batch
from ultramem_jax.training.step import make_eval_step
from ultramem_jax.tree_types import Variables


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Holds how well a model predicts the text that was evaluated."""

    loss: float
    """Mean loss over targets, in nats per token."""
    bits_per_byte: float
    """Bits that all targets take, divided by the bytes of text that they stand for."""
    tokens: int
    """Number of targets that the loss averages."""

    @property
    def perplexity(self) -> float:
        """Returns the perplexity per token, which compares only models of one tokenizer.

        It is infinite beyond the range of float64.
        """
        return math.inf if self.loss > 709 else math.exp(self.loss)


class TargetBytes:
    """Counts the bytes of text that the targets of a batch stand for.

    Tokens differ in length from one part of a text to another. So losses per byte need the bytes of exactly
    those targets that were scored. Special tokens, as those that end documents, stand for no bytes: what a
    model spends on them is charged to the text.

    Some tokenizers put a blank before a document, which is not a byte of it. So the first token of a document
    may stand for one byte less than elsewhere.
    """

    def __init__(self, tokenizer: Tokenizer, axes: MeshAxes):
        lengths, first = tokenizer.id_bytes, tokenizer.first_id_bytes
        begins = np.zeros(len(lengths), bool)
        if not np.array_equal(lengths, first):
            begins[[tokenizer.eos_id, *tokenizer.start_ids]] = True
        self._lengths, self._first, self._begins = (
            jax.make_array_from_callback(of_ids.shape, axes.sharding(P()), of_ids.__getitem__)
            for of_ids in (lengths, first, begins)
        )

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns the bytes of the targets of tokens (B, S + 1), as () int32.

        Args:
            tokens: the batch, on the mesh.
            mask: (B, S); targets whose mask is 0 do not count. None counts all.
        """
        return _bytes_of_targets(self._lengths, self._first, self._begins, tokens, mask)


# The sum is on every device: a scalar has no axis to be split along.
@jax.jit
def _bytes_of_targets(
    lengths: jax.Array, first: jax.Array, begins: jax.Array, tokens: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Returns the bytes of the targets.

    Args:
        lengths: (V,) int32, the bytes of every id.
        first: (V,) int32, the bytes of every id as the first of a document.
        begins: (V,) bool, whether a document begins after an id.
        tokens: (B, S + 1).
        mask: (B, S) or None.
    """
    # Targets are ids of the tokenizer, or padding, which the mask leaves out.
    at_start = begins.at[tokens[:, :-1]].get(mode="clip")
    inside, at_first = (of_ids.at[tokens[:, 1:]].get(mode="clip") for of_ids in (lengths, first))
    of_targets = jnp.where(at_start, at_first, inside)
    return of_targets.sum() if mask is None else jnp.where(mask > 0, of_targets, 0).sum()


class Evaluator:
    """Computes the mean loss over a split, on the same sequences each time.

    It takes as many sequences at a time as a micro-batch of training, and so needs no more memory. On a mesh,
    each batch is split over the devices as in training. All processes call it together.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, axes: MeshAxes | None = None):
        """Prepares to evaluate variables on the mesh of `axes`; None is the first device of this process."""
        self._corpus, self._train = corpus, config.train
        self._axes = one_device() if axes is None else axes
        step = make_eval_step(config, self._axes)
        self._step = jax.jit(step, out_shardings=self._axes.sharding())
        self._target_bytes = TargetBytes(corpus.tokenizer, self._axes)

    def __call__(
        self,
        variables: Variables,
        split: str = "validation",
        batches: int | None = None,
        *,
        stride: int | None = None,
        progress: bool = False,
        before_batch: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Returns the loss of the model on a split.

        Args:
            variables: the model's variables.
            split: `train`, `validation` or `test`.
            batches: number of batches of `train.batch_size` sequences; 0 is the whole split, None is
                `train.eval_batches`. Their sequences are spread evenly over the split.
            stride: tokens from the beginning of a sequence to that of the next, in [1, S]. None is S:
                disjoint sequences as in training. Below S, sequences overlap. Then only the last `stride`
                targets of each sequence but the first count. They have at least S - `stride` tokens of
                context, and none counts twice.
            progress: whether to draw a progress bar on standard error.
            before_batch: called before each micro-batch. What it raises ends the evaluation.

        Raises:
            UserError: see `eval_batches`.
        """
        micro_batches = self._train.grad_accumulation
        size = self._train.batch_size // micro_batches
        limit = (self._train.eval_batches if batches is None else batches) * micro_batches
        rows = rows_here(self._axes, size)
        loss, targets, text = 0.0, 0.0, 0
        for batch in tqdm(
            eval_batches(self._corpus, split, size, limit, rows, stride),
            desc=split,
            unit="batch",
            disable=not (progress and is_first()),
            leave=False,
        ):
            if before_batch is not None:
                before_batch()
            tokens, mask = (shard_batch(batch[name], self._axes, size) for name in ("tokens", "mask"))
            sums = self._step(variables, tokens, mask)
            text += int(self._target_bytes(tokens, mask))
            of_batch = np.asarray(sums, np.float64)
            loss, targets = loss + of_batch[0], targets + of_batch[1]
        return Evaluation(
            loss=float(loss / targets), bits_per_byte=bits_per_byte(float(loss), text), tokens=round(targets)
        )


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Converts a loss, summed over targets in nats, into bits per byte of the text that they stand for.

    It is infinite where there is no byte: a batch may hold nothing but ends of documents.
    """
    return nats / math.log(2) / num_bytes if num_bytes else math.inf
