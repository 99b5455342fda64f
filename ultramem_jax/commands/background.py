"""Counts how text reads the slots of a model's memories: the background of sparse memory fine-tuning.

Text stands for what a fine-tuned model must not forget. The counts are kept in a file beside the model, which
a run names in `train.background`, with `train.slots_per_step` rows of each table that a step may change:

    ultramem background --workdir=runs/demo
    ultramem train --init_from=runs/demo --config.train.background=runs/demo/background.npz
        --config.train.slots_per_step=500 --config.train.trainable=/values$ --workdir=runs/taught

By default the text is the training split of the run's own corpus. An open model (--model) needs --dataset.
"""

import pathlib

from absl import flags
from tqdm import tqdm

from ultramem_jax.accounting import count_parameters
from ultramem_jax.cli.outputs import output_file
from ultramem_jax.commands.given_batches import SPLIT, given_batches
from ultramem_jax.commands.given_model import MODEL, WORKDIR, given_model_with_memory
from ultramem_jax.commands.named_corpus import named_corpus
from ultramem_jax.inspection.usage import usage
from ultramem_jax.reporting import markdown
from ultramem_jax.training.background import count_reads, save_background
from ultramem_jax.training.room import running_out_in_a_line

FLAG_MODULES = (given_model_with_memory.__module__, named_corpus.__module__, given_batches.__module__)

OUTPUT = flags.DEFINE_string("output", "", "file to write; by default background.npz beside the model")


def main() -> None:
    """Counts the reads, writes the file, and prints how much of each table was read."""
    named = output_file("--output", OUTPUT.value) if OUTPUT.value else None
    given = given_model_with_memory()
    beside = pathlib.Path(MODEL.value or WORKDIR.value)
    output = named or output_file("--output", beside / "background.npz")
    _, corpus, batches = given_batches(given)
    read = tqdm(batches.texts(), desc=SPLIT.value, unit="batch", total=len(batches))
    micro_batches = given.run.config.train.grad_accumulation if given.run is not None else 1
    with running_out_in_a_line(count_parameters(given.config).total):
        background = count_reads(given.config, given.variables, read, micro_batches)
    shape = [batches.batch_size, corpus.seq_len]
    about = {"model": given.title, "corpus_hash": corpus.corpus_hash, "split": SPLIT.value, "batch": shape}
    save_background(output, background, about)
    print(f"{given.title}, {len(batches)} batches of {shape[0]} x {shape[1]} tokens of {SPLIT.value}")
    rows = []
    for table, of in background.items():
        found = usage(of.reads)
        share, top = f"{1 - found.never_read_share:.1%}", f"{found.top_share:.1%}"
        rows.append({"table": table, "slots": len(of.reads), "read": share, "reads of the top 1 %": top})
    print(markdown.table(rows))
    print(f"background reads: {output}")
