"""Defines the models that are taught: an open model with a grafted memory, and small ones of this library."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import jax
import numpy as np

from experiments.common.model_file import ModelFile
from experiments.common.whole_runs import train_whole
from experiments.forgetting import grafted
from experiments.forgetting.evaluation import Sizes
from experiments.forgetting.fine_tuning import BaseModel, Task
from experiments.forgetting.fingerprints import fingerprint
from experiments.forgetting.mixture import write_mixture
from experiments.forgetting.records import Setup
from ultramem_jax.accounting import count_parameters
from ultramem_jax.config import DataConfig, RunConfig, TrainConfig, to_dict
from ultramem_jax.config.model import table_readers
from ultramem_jax.data import eval_batches, load_corpus
from ultramem_jax.data.facts import Population
from ultramem_jax.presets import preset
from ultramem_jax.training.background import count_reads, load_background, save_background
from ultramem_jax.training.initial import Initial
from ultramem_jax.training.restore import LoadedModel, load_model
from ultramem_jax.tree_types import JsonDict

OWN = {"UltraMem": "ultramem-tiny", "Memory+": "memory-plus-tiny", "Engram": "engram-tiny"}
"""Presets of the small models, by their names in tables."""


@dataclass(frozen=True)
class Setting:
    """Says how a system is prepared, fine-tuned and measured."""

    before: Population
    """People whom it knows before it is taught others."""
    steps_before: int
    """Steps in which it learns them."""
    new: int
    """People of a task."""
    new_in_sequence: int
    """People of each task of a sequence."""
    copies: int
    """Paraphrases of each new person."""
    mixture_bytes: int
    """Size of the text that it learns before; see `write_mixture`."""
    mixture_share: float
    """Share of the mixture that is about people, in [0, 1)."""
    task: Task
    """The task, without its texts."""
    rates: dict[str, tuple[float, ...]]
    """Learning rates of each method that is compared, by its name; the best is chosen on other people, see
    `rates.tuned`."""
    sizes: Sizes
    background_batches: int
    """Batches of the mixture whose reads are the background."""


FOR_GRAFTED = Setting(
    before=Population(0, 8),
    steps_before=80,
    new=2,
    new_in_sequence=2,
    copies=32,
    mixture_bytes=1_200_000,
    mixture_share=0.5,
    task=Task(
        texts=(),
        steps=160,
        batch_size=3,
        seq_len=96,
        check_every=10,
        measure_every=40,
        enough=0.7,
        slots=2048,
    ),
    rates={
        "sparse memory, AdamW": (3e-2, 1e-1, 3e-1),
        "sparse memory, SGD": (1e3, 3e3, 1e4),
        "full memory": (1e-2, 3e-2, 1e-1),
        "LoRA": (3e-4, 1e-3, 3e-3),
        "full fine-tuning": (3e-5, 1e-4, 3e-4),
    },
    sizes=Sizes(batches=4, batch_size=4, seq_len=256),
    background_batches=100,
)
FOR_OWN = Setting(
    before=Population(0, 50),
    steps_before=1200,
    new=16,
    new_in_sequence=4,
    copies=32,
    mixture_bytes=6_000_000,
    mixture_share=0.3,
    task=Task(
        texts=(),
        steps=500,
        batch_size=4,
        seq_len=128,
        check_every=25,
        measure_every=100,
        enough=0.7,
        slots=2048,
    ),
    rates={
        "sparse memory, AdamW": (1e-2, 3e-2, 1e-1),
        "sparse memory, SGD": (100.0, 300.0, 1000.0),
        "full memory": (1e-3, 3e-3, 1e-2),
        "LoRA": (3e-4, 1e-3, 3e-3),
        "full fine-tuning": (3e-5, 1e-4, 3e-4),
    },
    sizes=Sizes(batches=16, batch_size=16, seq_len=128),
    background_batches=200,
)


_DENSE_RATE, _ROW_RATE = 5e-4, 5e-3
"""Learning rates of an open model's own parameters and of its memory's rows, before it is taught."""


def grafted_model(model: ModelFile, enwik8: str, work: Path) -> tuple[BaseModel, Setup]:
    """Returns the open model with its memory, after all of it has learned the people of `FOR_GRAFTED`."""
    text = DataConfig("enwik8", enwik8)
    alone = grafted.train_graft(model.path, text, work / "grafted")
    trained = alone.model.config
    mixture = _mixture(FOR_GRAFTED, enwik8, work / "mixture_grafted.txt")
    (memory,) = trained.model.memories.values()
    # All parameters learn, so that what is to be kept does not lie in the memory alone.
    memory = replace(memory, value_lr_multiple=_ROW_RATE / _DENSE_RATE)
    config = replace(
        trained,
        model=replace(trained.model, memories={grafted.MEMORY: memory}),
        data=replace(trained.data, dataset="text", path=str(mixture)),
        train=replace(
            trained.train,
            steps=FOR_GRAFTED.steps_before,
            learning_rate=_DENSE_RATE,
            trainable="",
            weight_decay=0.0,
        ),
    )
    name = f"{model.name} with Memory+"
    base = _prepared(name, FOR_GRAFTED, config, work / "grafted_base", lambda: Initial(alone.model.variables))
    words, settings = _in_words(FOR_GRAFTED, config), settings_of(FOR_GRAFTED, alone.model.config, config)
    return base, Setup(name, words, settings, model.sha256, alone.without_memory, alone.with_memory)


def own_model(name: str, enwik8: str, work: Path) -> tuple[BaseModel, Setup]:
    """Returns a small model of this library that was trained on the mixture of `FOR_OWN`."""
    mixture = _mixture(FOR_OWN, enwik8, work / "mixture_own.txt")
    config = RunConfig(
        replace(preset(OWN[name]), vocab_size=2048),
        DataConfig("text", str(mixture), tokenizer="bpe", bpe_vocab_size=2048, seq_len=128),
        TrainConfig(
            steps=FOR_OWN.steps_before,
            batch_size=16,
            learning_rate=3e-3,
            eval_every=400,
            checkpoint_every=200,
        ),
    )
    base = _prepared(name, FOR_OWN, config, work / f"{OWN[name]}_base", None)
    return base, Setup(name, _in_words(FOR_OWN, config), settings_of(FOR_OWN, config), "", None, None)


def settings_of(setting: Setting, *runs: RunConfig) -> JsonDict:
    """Returns what decides a system and its tasks, as `Setup.settings` keeps it, without paths."""
    of_setting = {field.name: getattr(setting, field.name) for field in fields(Setting)}
    del of_setting["rates"]
    of_task = {name: value for name, value in asdict(setting.task).items() if name != "texts"}
    of_setting |= {"before": setting.before.key, "task": of_task, "sizes": asdict(setting.sizes)}
    # Files count by what they hold: the mixture follows from the setting, and an open model has its hash.
    configs = (
        replace(run, data=replace(run.data, path="", tokenizer=Path(run.data.tokenizer).name)) for run in runs
    )
    return {"setting": of_setting, "runs": [to_dict(config) for config in configs]}


def _in_words(setting: Setting, config: RunConfig) -> str:
    """Describes the model, what it learns before, and its tasks."""
    count, train, task = count_parameters(config.model), config.train, setting.task
    tables = ", ".join(
        f"{readers[0].num_slots:,} of {table}" for table, readers in table_readers(config.model).items()
    )
    people, new = setting.before.end - setting.before.first, setting.new
    return (
        f"{count.total / 1e6:.1f} M parameters, {count.sparse / 1e6:.1f} M of them in slots ({tables}). "
        f"Before: all parameters take {train.steps:,} steps of {train.batch_size} × {config.data.seq_len} "
        f"tokens of enwik8 and biographies of {people} people, which are "
        f"{100 * setting.mixture_share:.0f} % of the text. A task: "
        f"{new} people in {setting.copies} paraphrases, at most {task.steps} steps of "
        f"{task.batch_size} × {task.seq_len} tokens; in a sequence {setting.new_in_sequence} people."
    )


def _mixture(setting: Setting, enwik8: str, path: Path) -> Path:
    size, share = setting.mixture_bytes, setting.mixture_share
    return write_mixture(path, enwik8, size, setting.before, share)


def _prepared(
    name: str,
    setting: Setting,
    config: RunConfig,
    workdir: Path,
    initial: Callable[[], Initial] | None,
) -> BaseModel:
    """Trains a system on its mixture, or goes on with that, and counts the background reads."""
    train_whole(config, workdir, initial=initial)
    loaded, background = load_model(workdir), workdir / "background.npz"
    _count(loaded, setting, background)
    variables = jax.tree.map(np.asarray, loaded.variables)
    return BaseModel(name, loaded.config.model, variables, loaded.tokenizer, str(background))


def _count(loaded: LoadedModel, setting: Setting, path: Path) -> None:
    """Counts the background reads, unless the file is of this model and of such batches."""
    task = setting.task
    corpus = load_corpus(replace(loaded.config.data, seq_len=task.seq_len), loaded.tokenizer)
    about = {
        "model": fingerprint(loaded.config.model, loaded.variables),
        "corpus_hash": corpus.corpus_hash,
        "batch": [task.batch_size, task.seq_len],
        "num_batches": setting.background_batches,
    }
    if path.exists() and about.items() <= load_background(path)[1].items():
        return
    batches = eval_batches(corpus, "train", task.batch_size, setting.background_batches)
    save_background(path, count_reads(loaded.config.model, loaded.variables, batches.texts()), about)
