"""Reads batches of the corpus of a command."""

from collections.abc import Iterator

import numpy as np
from absl import flags

from ultramem_jax.commands.given_model import GivenModel
from ultramem_jax.data import SPLITS, Corpus, EvalBatches, eval_batches

SPLIT = flags.DEFINE_enum("split", "train", SPLITS, "split of the corpus to read")
BATCHES = flags.DEFINE_integer(
    "batches", 200, "batches to read, spread evenly over the split; 0: all of it", lower_bound=0
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "sequences in a batch; by default as many as in a training step of the run, or 4 with --model",
    lower_bound=1,
    upper_bound=1 << 20,
)


def given_batches(given: GivenModel, corpus: Corpus) -> EvalBatches:
    """Returns the batches to read, spread evenly over the split."""
    size = BATCH_SIZE.value or (given.run.config.train.batch_size if given.run is not None else 4)
    return eval_batches(corpus, SPLIT.value, size, BATCHES.value)


def texts(batches: EvalBatches) -> Iterator[np.ndarray]:
    """Yields the ids (B, S) of each batch; the last one has fewer rows if sequences run out."""
    for batch in batches:
        there = batch["mask"].any(1)
        yield batch["tokens"][there, :-1]
