"""Validation and test bits per byte of a run's checkpoint."""

from absl import flags

from ultramem_jax.data import load_corpus
from ultramem_jax.training.loop import Evaluator, check_corpus
from ultramem_jax.training.restore import load_model

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "folder of the run")
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "`last`, `best` (validation loss), or a step")
BATCHES = flags.DEFINE_integer("batches", 0, "batches per split; 0 is all of it", lower_bound=0)


def main() -> None:
    """Prints a table: a row per split."""
    loaded = load_model(WORKDIR.value, CHECKPOINT.value)
    corpus = load_corpus(loaded.config.data)
    check_corpus(loaded.corpus, corpus, WORKDIR.value)
    evaluate = Evaluator(loaded.config, corpus)
    print(f"step {loaded.step} of {WORKDIR.value}, corpus {corpus.corpus_hash[:12]}")
    print(f"{'split':12}{'nats/token':>12}{'bits/byte':>12}")
    for split in ("validation", "test"):
        loss, bits = evaluate(loaded.variables, split, BATCHES.value, progress=True)
        print(f"{split:12}{loss:12.4f}{bits:12.4f}")
