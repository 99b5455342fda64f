"""Evaluates a run's checkpoint on the validation and test split, on any devices: loss and bits per byte.

By default the splits are cut into disjoint sequences of data.seq_len tokens. --stride slides a window over
them instead, so that each target has more context. The mesh on which the run was trained does not matter.

    ultramem evaluate --workdir=runs/demo --checkpoint=best --splits=test
"""

from dataclasses import replace
from decimal import Decimal

from absl import flags

from ultramem_jax.cli.arguments import check_names
from ultramem_jax.data import SPLITS, load_corpus
from ultramem_jax.reporting import markdown
from ultramem_jax.training.continuing import check_corpus
from ultramem_jax.training.evaluation import Evaluator
from ultramem_jax.training.restore import load_model

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "folder of the run")
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "`last`, `best` (validation loss), or a step")
SPLIT_NAMES = flags.DEFINE_list(
    "splits", ["validation", "test"], "splits to evaluate, of " + ", ".join(SPLITS)
)
STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "tokens between the starts of two windows of data.seq_len tokens; of each window, as many of the last "
    "targets count. Less gives more context and takes more time; by default data.seq_len: disjoint sequences",
)
BATCHES = flags.DEFINE_integer(
    "batches", 0, "batches per split, spread evenly over it; 0: all of it", lower_bound=0
)

BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "sequences in a batch; by default as many as in a training step, which may be too many for one device",
    lower_bound=1,
)


def main() -> None:
    """Evaluates the checkpoint and prints a table with a row per split."""
    splits = SPLIT_NAMES.value
    check_names("splits", splits, SPLITS)
    loaded = load_model(WORKDIR.value, CHECKPOINT.value)
    corpus = load_corpus(loaded.config.data)
    check_corpus(loaded.corpus, corpus, WORKDIR.value)
    stride = corpus.checked_stride(STRIDE.value)
    for split in splits:
        corpus.require_sequences(split)  # checks all splits before the first one takes its time
    config = loaded.config
    if BATCH_SIZE.value is not None:
        train = replace(config.train, batch_size=BATCH_SIZE.value, grad_accumulation=1)
        config = replace(config, train=train)
    evaluate = Evaluator(config, corpus)
    print(f"step {loaded.step} of {WORKDIR.value}, corpus {corpus.corpus_hash[:12]}")
    rows = []
    for split in splits:
        found = evaluate(loaded.variables, split, BATCHES.value, stride=stride, progress=True)
        row = {
            "split": split,
            "tokens scored": found.tokens,
            "context": context(corpus.seq_len, stride),
            "nats/token": Decimal(f"{found.loss:.4f}"),
            "bits/byte": Decimal(f"{found.bits_per_byte:.4f}"),
            "perplexity/token": found.perplexity,
        }
        rows.append(row)
    print(markdown.table(rows))


def context(seq_len: int, stride: int) -> str:
    """Returns the context length of each target, and the stride between windows, in words.

    The targets of the first window of a split are excepted: they have less context.
    """
    least = seq_len - stride + 1
    tokens = f"{least} to {seq_len}" if stride > 1 else f"{seq_len}"
    return f"{tokens} tokens, stride {stride}"
