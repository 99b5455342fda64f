"""Evaluates a run's checkpoint or an open model: bits per byte of a corpus, or tasks.

By default the splits are cut into disjoint sequences of data.seq_len tokens. --stride slides a window over
them instead, so that each target has more context. The mesh on which the run was trained does not matter.

    ultramem evaluate --workdir=runs/demo --checkpoint=best --splits=test

With --tasks it evaluates tasks of lm-evaluation-harness instead: its own, which download their data, or those
that YAML files in --tasks_path describe.

    ultramem evaluate --workdir=runs/demo --tasks=hellaswag,arc_easy --limit=100

With --model it evaluates an open model, a folder of Hugging Face or a GGUF file, by default on `stdlib`.
--dataset names any corpus:

    ultramem evaluate --model=model.gguf --dataset=text --path=book.txt --splits=test
"""

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

from absl import flags

from ultramem_jax.cli.arguments import check_names
from ultramem_jax.commands.given_model import MODEL, given_model
from ultramem_jax.commands.named_corpus import named_corpus
from ultramem_jax.config import ModelConfig, RunConfig, TrainConfig
from ultramem_jax.data import SPLITS, Tokenizer
from ultramem_jax.errors import UserError
from ultramem_jax.reporting import markdown
from ultramem_jax.training.evaluation import Evaluator
from ultramem_jax.tree_types import ArrayTree

FLAG_MODULES = (given_model.__module__, named_corpus.__module__)

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
    "sequences in a batch; by default as many as in a training step, which may be too many for one device; "
    "with --tasks by default 8, else with --model 1",
    lower_bound=1,
    upper_bound=1 << 20,
)
SEQ_LEN = flags.DEFINE_integer(
    "seq_len",
    None,
    "context of --model in tokens; by default the longest that it was made for, but at most 1,024",
    lower_bound=2,
)
TASKS = flags.DEFINE_list(
    "tasks",
    None,
    "tasks of lm-evaluation-harness to evaluate instead of splits; `paper`: the ten of the UltraMem paper",
)
TASKS_PATH = flags.DEFINE_string("tasks_path", "", "folder with further tasks, as YAML files")
LIMIT = flags.DEFINE_integer("limit", 0, "documents per task, the first ones; 0: all", lower_bound=0)
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "examples in each prompt of a task; by default the task's own number", lower_bound=0
)

_OF_SPLITS = ("splits", "stride", "batches", "dataset", "path")
_OF_TASKS = ("tasks_path", "limit", "num_fewshot")


def main() -> None:
    """Evaluates the model and prints a table with a row per split, or per metric of each task."""
    if not MODEL.value:
        _check_absent(("seq_len",), "needs --model; a run has its own")
    if TASKS.value is None:
        _check_absent(_OF_TASKS, "needs --tasks")
        _evaluate_splits()
    else:
        _check_absent(_OF_SPLITS, "is for splits, and --tasks evaluates tasks instead")
        _evaluate_tasks()


def _check_absent(names: Sequence[str], reason: str) -> None:
    for name in names:
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} = {flags.FLAGS[name].value!r}: {reason}")


def _evaluate_tasks() -> None:
    from ultramem_jax.interop import lm_eval_tasks  # noqa: F401  # says what is missing before anything is loaded

    given = given_model()
    print(given.title)
    print(task_table(given.config, given.variables, given.tokenizer, given.length(SEQ_LEN.value)))


def task_table(
    config: ModelConfig, variables: dict[str, ArrayTree], tokenizer: Tokenizer, max_length: int
) -> str:
    """Returns the table of the tasks that the flags name, for a model that reads up to `max_length` tokens.

    Raises:
        UserError: lm-evaluation-harness is not installed, or a task is not known or cannot be loaded.
    """
    # The harness takes seconds to import, and may not be installed.
    from ultramem_jax.interop.lm_eval import UltramemLM
    from ultramem_jax.interop.lm_eval_tasks import evaluate_tasks, result_rows

    batch_size = BATCH_SIZE.value or 8
    model = UltramemLM(config, variables, tokenizer, max_length=max_length, batch_size=batch_size)
    options = {"limit": LIMIT.value or None, "num_fewshot": NUM_FEWSHOT.value}
    results = evaluate_tasks(model, TASKS.value or [], TASKS_PATH.value, **options)
    return markdown.table(result_rows(results))


def _evaluate_splits() -> None:
    splits = SPLIT_NAMES.value
    check_names("splits", splits, SPLITS)
    given = given_model()
    data, corpus = named_corpus(given, given.length(SEQ_LEN.value), default="stdlib")
    train = given.run.config.train if given.run is not None else TrainConfig(batch_size=1)
    stride = corpus.checked_stride(STRIDE.value)
    for split in splits:
        corpus.require_sequences(split)  # checks all splits before the first one takes its time
    if BATCH_SIZE.value is not None:
        train = replace(train, batch_size=BATCH_SIZE.value, grad_accumulation=1)
    evaluate = Evaluator(RunConfig(given.config, data, train), corpus)
    print(f"{given.title}, corpus {corpus.corpus_hash[:12]}")
    rows = []
    for split in splits:
        found = evaluate(given.variables, split, BATCHES.value, stride=stride, progress=True)
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
