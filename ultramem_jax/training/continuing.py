"""Compares a resumed run with its checkpoint: some settings must not change, and other changes are logged."""

import logging
from pathlib import Path

from ultramem_jax.config import RunConfig, to_dict
from ultramem_jax.config.old_configs import is_old_tree
from ultramem_jax.data import Corpus, Tokenizer
from ultramem_jax.errors import UserError, require
from ultramem_jax.training.checkpoint_reading import Differences, Meta, differences, saved_config, shown
from ultramem_jax.training.dense_optimizer import table_learning_rates
from ultramem_jax.training.schedules import learning_rate
from ultramem_jax.tree_types import JsonDict

log = logging.getLogger(__name__)

_FIXED = (
    "data.seq_len",
    "train.batch_size",
    "train.seed",
    "train.table_gradient",
    "train.optimizer",
    "train.row_optimizer",
    "train.trainable",
    "train.slots_per_step",
    "train.slot_score",
    "train.lora_rank",
    "train.lora_alpha",
    "train.lora_targets",
)
"""Settings that must not change. Without them a position in the data, or a part of the state, has no meaning;
or parameters that a run has promised not to change would change."""


def corpus_identity(corpus: Corpus) -> JsonDict:
    """Returns what a checkpoint says of its data, for JSON: hashes of text and tokenizer, and sizes."""
    return {
        "corpus_hash": corpus.corpus_hash,
        "num_tokens": corpus.num_tokens,
        "num_bytes": corpus.num_bytes,
        **tokenizer_identity(corpus.tokenizer),
    }


def tokenizer_identity(tokenizer: Tokenizer) -> JsonDict:
    """Returns the part of `corpus_identity` that describes the tokenizer."""
    return {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.fingerprint,
    }


def check_corpus(of_checkpoint: JsonDict, corpus: Corpus, workdir: str | Path) -> None:
    """Refuses a corpus whose text, tokenizer or tokens are not those that a checkpoint was trained on.

    Args:
        of_checkpoint: `Meta.corpus`. What an older version did not write is not compared.
        corpus: the one to read now.
        workdir: folder of the run.

    Raises:
        UserError: they differ; the message gives both hashes, or both numbers of tokens.
    """
    then, now = of_checkpoint, corpus_identity(corpus)
    if then.get("corpus_hash") != now["corpus_hash"]:
        raise UserError(
            f"corpus {now['corpus_hash'][:12]} is not the one that {workdir} was trained on, "
            f"{str(then.get('corpus_hash'))[:12]}: give another --workdir, or the same data"
        )
    advice = "keep data.tokenizer and data.bpe_vocab_size, or give another --workdir"
    check_tokenizer(then, corpus.tokenizer, f"this corpus ({corpus.folder})", workdir, advice)
    if then.get("num_tokens", now["num_tokens"]) != now["num_tokens"]:
        raise UserError(
            f"corpus {now['corpus_hash'][:12]} has {now['num_tokens']} tokens, and {then['num_tokens']} when "
            f"{workdir} was trained on it: it was tokenized in another way; give another --workdir"
        )


def check_tokenizer(
    of_checkpoint: JsonDict, tokenizer: Tokenizer, where: str, workdir: str | Path, advice: str
) -> None:
    """Refuses a tokenizer that is not the one that a checkpoint was trained with.

    Args:
        of_checkpoint: the same as in `check_corpus`.
        tokenizer: the one to use now.
        where: the place that it comes from, for the message.
        workdir: folder of the run.
        advice: what to do, for the message.

    Raises:
        UserError: they differ; the message gives names, sizes and hashes of both.
    """
    then, now = of_checkpoint.get("tokenizer_hash", tokenizer.fingerprint), tokenizer.fingerprint
    if then == now:
        return
    size_then, name_then = of_checkpoint.get("vocab_size"), of_checkpoint.get("tokenizer")
    raise UserError(
        f"the tokenizer of {where} is {tokenizer.name!r} of {tokenizer.vocab_size} ids ({now[:12]}) and not "
        f"the one that {workdir} was trained with, {name_then!r} of {size_then} ids ({str(then)[:12]}): "
        f"{advice}"
    )


def check_same_run(meta: Meta, config: RunConfig, corpus: Corpus, workdir: Path) -> None:
    """Refuses to resume a run with settings, or on data, that would make it another run.

    Raises:
        UserError: names the first thing that must not change.
    """
    if is_old_tree(meta.config) and meta.config["model"]["memory"] is not None:
        raise UserError(
            f"{workdir} was begun by an earlier version, whose memories had another config: load_model reads "
            "it, and to train give another --workdir"
        )
    require(
        meta.step <= config.train.steps,
        "train.steps",
        config.train.steps,
        f"must be at least {meta.step}, the steps that {workdir} has done",
    )
    check_corpus(meta.corpus, corpus, workdir)
    _, changed = _changes(meta, config, workdir)
    for name in _FIXED:
        if name in changed:
            then, now = changed[name]
            require(False, name, now, f"must stay {then!r}, as {workdir} began; or give another --workdir")


def say_what_changed(meta: Meta, config: RunConfig, workdir: Path) -> None:
    """Logs each setting that differs from the checkpoint's, and how learning rates jump because of it."""
    before, changed = _changes(meta, config, workdir)
    if "train.background" in changed:
        del changed["train.background"]
        log.info("train.background is not read again: the checkpoint holds what the run has taken from it")
    for name, (then, now) in changed.items():
        log.info("%s = %s from step %d on, %s before", name, shown(now), meta.step + 1, shown(then))
    for line in _jumps(before, config, meta.step):
        log.info("%s", line)


def _changes(meta: Meta, config: RunConfig, workdir: Path) -> tuple[RunConfig, Differences]:
    """Returns the checkpoint's config, and the fields in which this one differs from it."""
    before = saved_config(workdir / "checkpoints" / str(meta.step), meta.config)
    return before, differences(to_dict(before), to_dict(config))


def _jumps(before: RunConfig, now: RunConfig, step: int) -> list[str]:
    """Returns a line for each learning rate that jumps after `step`, where the schedules differ."""
    if step == 0 or step == now.train.steps:
        return []
    schedules = {"learning rate": [learning_rate(config.train) for config in (before, now)]}
    of_tables = [table_learning_rates(config) for config in (before, now)]
    for group in of_tables[1].keys() & of_tables[0].keys():
        of = f" of {group}" if len(of_tables[1]) > 1 else ""
        schedules[f"learning rate of tables{of}"] = [rates[group] for rates in of_tables]
    lines = []
    for name, (old, new) in schedules.items():
        if float(old(step)) == float(new(step)):
            continue
        last, following = float(old(step - 1)), float(new(step))
        factor = f" (×{following / last:.3g})" if last else ""
        lines.append(
            f"the {name} jumps from {last:.3g} in step {step} to {following:.3g} in step {step + 1}{factor}"
        )
    return lines
