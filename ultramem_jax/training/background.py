"""Counts how background text reads the slots of every table, and keeps the counts in a file.

Fine-tuning that should not forget compares its own reads with these counts (`training.slot_selection`). What
they cost per batch depends on its reads; the counts themselves are two int32 per slot.
"""

import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import UserError, at_least, one_line, require
from ultramem_jax.files import replacing
from ultramem_jax.models import Transformer
from ultramem_jax.training.table_gradients import rows_of_tables
from ultramem_jax.tree_types import JsonDict, Variables

_DESCRIPTION = "description"
_ARRAYS = ("batches", "reads")
"""Arrays of `BackgroundReads` that a file holds for each table."""


class BackgroundReads(NamedTuple):
    """Holds how batches of background text read the slots of one table."""

    batches: np.ndarray
    """(N,) int32, the number of batches that read each slot."""
    reads: np.ndarray
    """(N,) int32, the number of reads of each slot, at most 2³¹ - 1."""
    num_batches: int
    """|B|, all batches."""


class _Counts(NamedTuple):
    """Holds the counts of one table on the device; see `BackgroundReads`."""

    batches: jax.Array
    reads: jax.Array
    last: jax.Array
    """(N,) int32, number of the last batch that read each slot, from 1; 0 if none has."""


def count_reads(
    config: ModelConfig, variables: Variables, batches: Iterable[np.ndarray], micro_batches: int = 1
) -> dict[str, BackgroundReads]:
    """Returns the reads of every table of a model, over batches of text.

    Args:
        config: the model's config.
        variables: its `params`, `memory` and `buffers`.
        batches: token ids (B, S) int32, without padding. Each new shape is compiled.
        micro_batches: parts of a batch that are read one after the other, which takes less memory.

    Raises:
        UserError: the model has no memory, there is no batch or no part, or a part has 2³¹ reads or more.
    """
    require(bool(config.memories), "model.memories", {}, "must name a memory, whose reads can be counted")
    tables = table_readers(config)
    counts = {
        table: _Counts(*(jnp.zeros(readers[0].num_slots, jnp.int32) for _ in _Counts._fields))
        for table, readers in tables.items()
    }
    at_least(1, micro_batches=micro_batches)
    count = jax.jit(partial(_counted, config), donate_argnums=0)
    per_token = max(sum(site.config.reads_per_token for site in readers) for readers in tables.values())
    num_batches = 0
    for num_batches, tokens in enumerate(batches, start=1):
        for part in np.array_split(tokens, min(micro_batches, len(tokens))):
            reads = part.size * per_token
            require(
                reads < 2**31, "reads of a micro-batch", reads, "must be below 2^31: take smaller batches"
            )
            counts = count(counts, variables, part, np.int32(num_batches))
    require(num_batches > 0, "batches", num_batches, "must be at least 1")
    return {
        table: BackgroundReads(np.asarray(of.batches), np.asarray(of.reads), num_batches)
        for table, of in counts.items()
    }


def _counted(
    config: ModelConfig,
    counts: dict[str, _Counts],
    variables: Variables,
    tokens: jax.Array,
    batch: jax.Array,
) -> dict[str, _Counts]:
    """Returns the counts with those of a part (b, S) of a batch, whose number is given."""
    _, sown = Transformer(config).apply(variables, tokens, mutable=["reads"])
    return {
        table: _added(counts[table], rows.slots, rows.counts, batch)
        for table, rows in rows_of_tables(config, sown["reads"]).items()
    }


def _added(counts: _Counts, slots: jax.Array, reads: jax.Array, batch: jax.Array) -> _Counts:
    before, last = (of.at[slots].get(mode="fill", fill_value=0) for of in (counts.reads, counts.last))
    most = jnp.iinfo(jnp.int32).max
    after = jnp.where(before > most - reads, most, before + reads)
    first = (last != batch).astype(jnp.int32)
    # Slots past the last row read are padding, and are dropped.
    return _Counts(
        counts.batches.at[slots].add(first, mode="drop", unique_indices=True),
        counts.reads.at[slots].set(after, mode="drop", unique_indices=True),
        counts.last.at[slots].set(batch, mode="drop", unique_indices=True),
    )


def save_background(
    path: str | os.PathLike[str], background: Mapping[str, BackgroundReads], about: Mapping[str, Any]
) -> None:
    """Writes the reads of all tables into one file, which appears whole or not at all.

    Args:
        path: the file; its folder must exist.
        background: the result of `count_reads`.
        about: what else to say in the file, for JSON, such as the model and the corpus.

    Raises:
        UserError: no table, or the system refuses.
    """
    at_least(1, tables=len(background))
    arrays: dict[str, Any] = {
        f"{table}/{name}": getattr(of, name) for table, of in background.items() for name in _ARRAYS
    }
    num_batches = next(iter(background.values())).num_batches
    description = {"num_batches": num_batches, "tables": list(background), **about}
    try:
        with replacing(Path(path)) as partial_path, partial_path.open("wb") as file:
            np.savez(file, **arrays | {_DESCRIPTION: np.array(json.dumps(description))})
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def load_background(path: str | os.PathLike[str]) -> tuple[dict[str, BackgroundReads], JsonDict]:
    """Returns the reads of all tables that `save_background` wrote, and what the file says about them.

    Args:
        path: the file; "~" is the home folder.

    Raises:
        UserError: there is no such file, or it is another one or a broken one.
    """
    try:
        with open(Path(path).expanduser(), "rb") as opened, np.load(opened) as file:
            description = json.loads(str(file[_DESCRIPTION]))
            number = description["num_batches"]
            background = {
                table: _checked(BackgroundReads(file[f"{table}/batches"], file[f"{table}/reads"], number))
                for table in description["tables"]
            }
            return background, description
    # What a broken archive of arrays raises is not documented, and is of many kinds.
    except Exception as error:
        allowed = "must be a file that the command `background` has written"
        raise UserError(f"train.background = {os.fspath(path)!r}: {allowed}: {one_line(error)}") from None


def _checked(of: BackgroundReads) -> BackgroundReads:
    """Returns the reads of a file, if they are such reads.

    Raises:
        ValueError: they are not.
    """
    alike = of.batches.shape == of.reads.shape and of.reads.ndim == 1
    integers = all(np.issubdtype(array.dtype, np.integer) for array in (of.batches, of.reads))
    if not (alike and integers and type(of.num_batches) is int and of.num_batches >= 1):
        raise ValueError("other arrays")
    if of.batches.min(initial=0) < 0 or of.reads.min(initial=0) < 0 or of.batches.max() > of.num_batches:
        raise ValueError("counts that cannot be")
    return of
