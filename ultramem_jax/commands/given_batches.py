"""Cuts the corpus of a command into batches."""

from absl import flags

from ultramem_jax.commands.model_and_tokenizer import GivenModel
from ultramem_jax.commands.named_corpus import named_corpus
from ultramem_jax.config import DataConfig
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
SEQ_LEN = flags.DEFINE_integer(
    "seq_len",
    None,
    "tokens of a sequence; by default as many as in training, or with --model as many as that was made for, "
    "but at most 1,024",
    lower_bound=1,
)


def given_batches(given: GivenModel) -> tuple[DataConfig, Corpus, EvalBatches]:
    """Returns the corpus of the command, and the batches to read, spread evenly over the split.

    Raises:
        UserError: see `GivenModel.length` and `named_corpus`.
    """
    data, corpus = named_corpus(given, given.length(SEQ_LEN.value))
    size = BATCH_SIZE.value or (given.run.config.train.batch_size if given.run is not None else 4)
    return data, corpus, eval_batches(corpus, SPLIT.value, size, BATCHES.value)
