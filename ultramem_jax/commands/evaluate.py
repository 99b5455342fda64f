"""Validation and test bits per byte of a run's checkpoint, whatever devices it was trained on."""

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
SPLIT_NAMES = flags.DEFINE_list("splits", ["validation", "test"], "what to evaluate, of " + ", ".join(SPLITS))
STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "tokens that a window of data.seq_len moves on by; of each window its last targets count, as many. Less "
    "gives more context and takes more time; by default it is data.seq_len: disjoint sequences",
)
BATCHES = flags.DEFINE_integer(
    "batches", 0, "batches per split, spread evenly over it; 0 is all of it", lower_bound=0
)

BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "sequences at a time; by default as many as in a training step, which on one device may be too many",
    lower_bound=1,
)


def main() -> None:
    """Prints a table: a row per split."""
    splits = SPLIT_NAMES.value
    check_names("splits", splits, SPLITS)
    loaded = load_model(WORKDIR.value, CHECKPOINT.value)
    corpus = load_corpus(loaded.config.data)
    check_corpus(loaded.corpus, corpus, WORKDIR.value)
    stride = corpus.checked_stride(STRIDE.value)
    for split in splits:
        corpus.require_sequences(split)  # of all, before the first takes its time
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
    """From how many tokens a target is foretold, those of the split's first window apart, and the stride."""
    least = seq_len - stride + 1
    tokens = f"{least} to {seq_len}" if stride > 1 else f"{seq_len}"
    return f"{tokens} tokens, stride {stride}"
