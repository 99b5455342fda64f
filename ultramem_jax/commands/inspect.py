"""Looks inside the memories of a model: writes an HTML file that shows what each token of a text reads.

A click on a token shows its slots, and a click on a slot its strongest contexts in a corpus, the tokens that
it promotes, how often it is read, its nearest slots, and what the text costs without it. The file loads
nothing from elsewhere. The model is a run's checkpoint or an open model.

    ultramem inspect --workdir=runs/demo --text='def parse_args(self, args=None):' --out=inspect.html
    ultramem inspect --model=exported --dataset=text --path=book.txt --text_file=page.txt

The corpus is read once; by default it is the training split of the run's own. Slots can be knocked out
together, for the loss of the text without them:

    ultramem inspect --text='def ' --knock_out=ultramem_0:123,ultramem_0:77

Or rows are changed, and the model is saved as a new run (of an open model: as a new folder), in which nothing
else differs:

    ultramem inspect --edit=ultramem_0:123=zero --edit=ultramem_0:5=swap:6 --save_to=runs/edited
"""

import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
from absl import flags
from tqdm import tqdm

from ultramem_jax.cli.outputs import output_file, output_folder
from ultramem_jax.commands.given_batches import BATCH_SIZE, BATCHES, SEQ_LEN, SPLIT, given_batches
from ultramem_jax.commands.given_model import DTYPE, MODEL, WORKDIR, given_model_with_memory
from ultramem_jax.commands.model_and_tokenizer import GivenModel
from ultramem_jax.commands.named_corpus import DATASET, PATH, named_corpus
from ultramem_jax.data import EvalBatches
from ultramem_jax.errors import UserError, require
from ultramem_jax.files import replace_text
from ultramem_jax.inspection import (
    Edit,
    edit,
    knock_out,
    page,
    parse_edit,
    row_changes,
    save_edited_run,
    trace,
)
from ultramem_jax.inspection.edits import Changes
from ultramem_jax.inspection.knock_outs import change_in_words, parse_slots
from ultramem_jax.inspection.tracing import encoded
from ultramem_jax.interop import open_models
from ultramem_jax.reporting import markdown
from ultramem_jax.training.metrics import METRICS_FILE, records_until
from ultramem_jax.tree_types import JsonDict

FLAG_MODULES = (given_model_with_memory.__module__, named_corpus.__module__, given_batches.__module__)

TEXT = flags.DEFINE_string("text", None, "text to trace through the model")
TEXT_FILE = flags.DEFINE_string("text_file", None, "file with that text")
OUT = flags.DEFINE_string("out", "inspect.html", "HTML file to write")
CORPUS = flags.DEFINE_bool(
    "corpus",
    None,
    "whether to read a corpus for contexts and counts; by default if there is one: a run's, or --dataset",
)
CARDS = flags.DEFINE_integer(
    "cards", 400, "slots of the text to look into, those of its tokens' strongest reads", lower_bound=0
)
KNOCK_OUT = flags.DEFINE_list(
    "knock_out", [], "slots to knock out together, MEMORY:SLOT,...: the loss of the text without them"
)
EDIT = flags.DEFINE_multi_string(
    "edit",
    [],
    "change of a row, MEMORY:SLOT=zero, =scale:FACTOR, =copy:SLOT (the row of another slot), =swap:SLOT or "
    "=values:FILE.npy; several are made in order; no page is written",
)
SAVE_TO = flags.DEFINE_string("save_to", None, "folder of the edited model, which must be new or empty")

OF_CORPUS = (DATASET, PATH, SPLIT, BATCHES, BATCH_SIZE, SEQ_LEN)
"""Flags that say which corpus is read."""


def main() -> None:
    """Writes the page, or the edited model."""
    text = _text()
    require(bool(SAVE_TO.value) or not EDIT.value, "--edit", EDIT.value, "needs --save_to")
    require(bool(EDIT.value) or SAVE_TO.value is None, "--save_to", SAVE_TO.value, "needs --edit")
    if EDIT.value:
        # The dtype of the computation would be that of the edited model's dense parameters.
        for flag in (KNOCK_OUT, OUT, CARDS, CORPUS, *OF_CORPUS, DTYPE):
            require(not flag.present, f"--{flag.name}", flag.value, "must not be given with --edit")
        target = output_folder("--save_to", SAVE_TO.value or "")
    else:
        target = output_file("--out", OUT.value)
    given = given_model_with_memory()
    if text is not None:
        length = len(encoded(given.config, given.tokenizer, text))
        require(
            length <= given.max_length, "tokens of the text", length, f"must be at most {given.max_length}"
        )
    if EDIT.value:
        _edit(given, text, target)
    else:
        assert text is not None
        _inspect(given, text, target)


def _text() -> bytes | None:
    """Returns the text of the flags; None if there is none and none is needed."""
    require(
        TEXT.value is None or TEXT_FILE.value is None,
        "--text_file",
        TEXT_FILE.value,
        "must not be given with --text",
    )
    if TEXT_FILE.value is not None:
        return pathlib.Path(TEXT_FILE.value).read_bytes()
    if TEXT.value is not None:
        return TEXT.value.encode(errors="surrogateescape")
    if not EDIT.value:
        raise UserError("--text: must be given, or --text_file")
    return None


# ---- the page


def _inspect(given: GivenModel, text: bytes, out: pathlib.Path) -> None:
    slots = parse_slots(given.config, "--knock_out", KNOCK_OUT.value)
    options: JsonDict = {}
    if _reads_corpus(given):
        data, corpus, batches = given_batches(given)
        name = " ".join(filter(None, (data.dataset, data.path)))
        options = {
            "batches": _padded(batches),
            "corpus_name": f"{len(batches):,} batches of the {SPLIT.value} split of {name}",
            "corpus_tokens": len(batches.indices) * corpus.seq_len,
        }
    metrics = pathlib.Path(WORKDIR.value) / METRICS_FILE
    if given.run is not None and metrics.is_file():
        options["records"] = records_until(metrics, given.run.step)
    found = knock_out(given.config, given.variables, given.tokenizer, text, slots) if slots else None
    written = page(
        given.config,
        given.variables,
        given.tokenizer,
        text,
        knocked_out=found,
        title=given.title,
        cards=CARDS.value,
        progress=_bar,
        **options,
    )
    replace_text(out, written)
    if found is not None:
        print(f"without {sum(map(len, found.slots.values()))} slots: {found.in_words()}")
    print(f"{out} ({len(written) / 1000:,.0f} kB): {out.resolve().as_uri()}")


def _reads_corpus(given: GivenModel) -> bool:
    """Tells whether a corpus is to be read, and refuses flags that say which one if none is."""
    known = DATASET.value is not None or given.run is not None
    if known if CORPUS.value is None else CORPUS.value:
        return True
    why = "must not be given with --nocorpus" if known else "needs a corpus: --dataset must name it"
    for flag in OF_CORPUS:
        require(not flag.present, f"--{flag.name}", flag.value, why)
    return False


def _padded(batches: EvalBatches) -> Iterator[np.ndarray]:
    """Yields the ids of each batch in one shape; -1 pads the last one."""
    for ids in batches.texts():
        yield np.pad(ids, ((0, batches.batch_size - len(ids)), (0, 0)), constant_values=-1)


def _bar(what: str, total: int) -> Callable[[int], object]:
    """Draws a progress bar on standard error, which stays when it is full."""
    bar = tqdm(total=total, desc=what, unit_scale=True, file=sys.stderr)

    def update(done: int) -> None:
        bar.update(done)
        if bar.n >= total:
            bar.close()

    return update


# ---- edits


def _edit(given: GivenModel, text: bytes | None, save_to: pathlib.Path) -> None:
    edits = [parse_edit(given.config, entry, "--edit") for entry in EDIT.value]
    if text is not None:
        _print_losses(given, edits, text)
    if given.run is not None:
        # The state of the run is read once more, with its optimizers' moments.
        given.variables.clear()
        changes = save_edited_run(WORKDIR.value, given.run.step, edits, save_to, given.tokenizer)
    else:
        changes = row_changes(given.config, given.variables["memory"], edits)
        edited = edit(given.config, given.variables, edits)
        open_models.save(save_to, given.config, edited, tokenizer=given.tokenizer)
    print(_changes_in_words(changes))
    flag = "model" if MODEL.value else "workdir"
    print(f"edited model: {save_to}; look at it with --{flag}={save_to}")


def _print_losses(given: GivenModel, edits: list[Edit], text: bytes) -> None:
    edited = edit(given.config, given.variables, edits)
    before, after = (
        trace(given.config, variables, given.tokenizer, text).loss for variables in (given.variables, edited)
    )
    print(f"edited: {change_in_words(before, after)}")


def _changes_in_words(changes: Changes) -> str:
    """Returns a table of the rows that differ; no row, in words."""
    rows = [
        {"table": table, "array": part, "slot": int(slot), "numbers that differ": int((old != new).sum())}
        for table, parts in changes.items()
        for part, change in parts.items()
        for slot, old, new in zip(*change, strict=True)
    ]
    return markdown.table(rows) if rows else "no row differs: the edits leave every bit as it is"
