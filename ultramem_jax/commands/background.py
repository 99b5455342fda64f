"""Counts how text reads the slots of a model's memories: the background of sparse memory fine-tuning.

Text stands for what a fine-tuned model must not forget. The counts are kept in a file beside the model, which
a run names in `train.background`, with `train.slots_per_step` rows of each table that a step may change:

    ultramem background --workdir=runs/demo
    ultramem train --init_from=runs/demo --config.train.background=runs/demo/background.npz
        --config.train.slots_per_step=500 --config.train.trainable=/values$ --workdir=runs/taught

By default the text is the training split of the run's own corpus. An open model (--model) needs --dataset.
"""

import pathlib

import numpy as np
from absl import flags
from tqdm import tqdm

from ultramem_jax.commands.given_model import MODEL, WORKDIR, GivenModel, corpus_for, given_model
from ultramem_jax.data import SPLITS, Corpus, eval_batches, load_corpus
from ultramem_jax.errors import UserError, require
from ultramem_jax.reporting import markdown
from ultramem_jax.training.background import count_reads, save_background

FLAG_MODULES = (given_model.__module__,)

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
OUTPUT = flags.DEFINE_string("output", "", "file to write; by default background.npz beside the model")


def main() -> None:
    """Counts the reads, writes the file, and prints how much of each table was read."""
    given = given_model()
    require(
        bool(given.config.memories), "--model" if MODEL.value else "--workdir", given.title, "has no memory"
    )
    output = _output()
    corpus = _corpus(given)
    size = BATCH_SIZE.value or (given.run.config.train.batch_size if given.run is not None else 4)
    batches = eval_batches(corpus, SPLIT.value, size, BATCHES.value)
    texts = (batch["tokens"][:, :-1] for batch in tqdm(batches, desc=SPLIT.value, unit="batch"))
    background = count_reads(given.config, given.variables, texts)
    about = {"corpus_hash": corpus.corpus_hash, "split": SPLIT.value, "batch": [size, corpus.seq_len]}
    save_background(output, background, about)
    print(f"{given.title}, {len(batches)} batches of {size} x {corpus.seq_len} tokens of {SPLIT.value}")
    rows = [
        {
            "table": table,
            "slots": len(of.reads),
            "read": f"{(of.reads > 0).mean():.1%}",
            "reads of the top 1 %": f"{_share_of_top(of.reads):.1%}",
        }
        for table, of in background.items()
    ]
    print(markdown.table(rows))
    print(f"background reads: {output}")


def _output() -> pathlib.Path:
    """Returns the file to write, and refuses one that cannot be written before anything is counted."""
    beside = pathlib.Path(MODEL.value or WORKDIR.value)
    path = pathlib.Path(OUTPUT.value) if OUTPUT.value else beside / "background.npz"
    require(path.parent.is_dir(), "--output", str(path), "must be in a folder that exists")
    return path


def _corpus(given: GivenModel) -> Corpus:
    if DATASET.value is not None:
        return corpus_for(given, DATASET.value, PATH.value, given.max_length)[1]
    require(not PATH.present, "--path", PATH.value, "needs --dataset")
    if given.run is None:
        raise UserError("--dataset: must be given with --model, whose training text is not known")
    return load_corpus(given.run.config.data, given.tokenizer)


def _share_of_top(reads: np.ndarray) -> float:
    """Returns the share of all reads that go to the 1 % of slots that are read most."""
    return np.sort(reads)[-max(len(reads) // 100, 1) :].sum(dtype=np.int64) / max(
        reads.sum(dtype=np.int64), 1
    )
