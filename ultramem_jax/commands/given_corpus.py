"""Reads the corpus of a command: that of the run, or any that the flags name, tokenized for the model."""

from collections.abc import Iterator

import numpy as np
from absl import flags

from ultramem_jax.commands.given_model import GivenModel, corpus_for, corpus_of_run
from ultramem_jax.data import SPLITS, Corpus, EvalBatches, eval_batches
from ultramem_jax.errors import UserError, require

DATASET = flags.DEFINE_string("dataset", None, "corpus, as data.dataset of a run; by default the run's own")
PATH = flags.DEFINE_string("path", "", "file or folder of --dataset, as data.path of a run")
SPLIT = flags.DEFINE_enum("split", "train", SPLITS, "split of the corpus to read")
BATCHES = flags.DEFINE_integer(
    "batches", 200, "batches to read, spread evenly over the split; 0: all of it", lower_bound=0
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "sequences in a batch; by default as many as in a training step of the run, or 4 with --model",
    lower_bound=1,
)


def given_corpus(given: GivenModel) -> Corpus:
    """Returns the corpus that the flags name, or else that of the run.

    Raises:
        UserError: the flags name none for an open model; see also `load_corpus`.
    """
    if DATASET.value is not None:
        return corpus_for(given, DATASET.value, PATH.value, given.max_length)[1]
    require(not PATH.present, "--path", PATH.value, "needs --dataset")
    if given.run is None:
        raise UserError("--dataset: must be given with --model, whose training text is not known")
    return corpus_of_run(given.run)


def given_batches(given: GivenModel, corpus: Corpus) -> EvalBatches:
    """Returns the batches to read, spread evenly over the split."""
    size = BATCH_SIZE.value or (given.run.config.train.batch_size if given.run is not None else 4)
    return eval_batches(corpus, SPLIT.value, size, BATCHES.value)


def texts(batches: EvalBatches) -> Iterator[np.ndarray]:
    """Yields the ids (B, S) of each batch; the last one has fewer rows if sequences run out."""
    for batch in batches:
        there = batch["mask"].any(1)
        yield batch["tokens"][there, :-1]
