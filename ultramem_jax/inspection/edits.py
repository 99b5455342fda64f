"""Replaces and moves rows of tables, and saves the result as a new checkpoint.

    edited = edit(config, variables, [parse_edit(config, "ultramem_0:123=zero")])

An edit changes rows and nothing else. `edit` copies each table that it changes once, because the caller keeps
the old variables. `save_edited_run` works on a state of its own, in place.
"""

import math
import shutil
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.data import PeekingIterator, Tokenizer
from ultramem_jax.errors import UserError, choice, one_line, require, unknown, whole_number
from ultramem_jax.files import is_new_or_empty
from ultramem_jax.inspection.names import checked_slots, table_of
from ultramem_jax.interop.hf_folder import new_folder
from ultramem_jax.ops.rows import put_stored_rows, take_stored_rows
from ultramem_jax.parallel.mesh import one_device
from ultramem_jax.training.checkpoint_reading import saved_config
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.metrics import METRICS_FILE, MetricWriter
from ultramem_jax.training.restore import for_this_device, save_tokenizer
from ultramem_jax.training.state import abstract_state
from ultramem_jax.tree_types import ArrayTree, JsonDict, Variables

Action = Literal["zero", "scale", "copy", "swap", "values"]
_FORMS = "must be MEMORY:SLOT=zero, =scale:FACTOR, =copy:SLOT, =swap:SLOT or =values:FILE.npy"


class Edit(NamedTuple):
    """Describes a change of a row."""

    table: str
    """Name of the table, or of a memory that reads it."""
    slot: int
    """The row that changes."""
    action: Action
    """`zero`: its values become zeros. `scale`: its values are multiplied by `factor`, and rounded to nearest
    in bfloat16. `values`: its values become `values`. `copy`: the row becomes that of the slot `other`,
    pre-values included. `swap`: the two rows change places."""
    factor: float = 1.0
    """For `scale`."""
    other: int = 0
    """For `copy` and `swap`."""
    values: np.ndarray | None = None
    """For `values`: (d_v,) floats."""


class RowChange(NamedTuple):
    """Holds the old and the new bits of rows of one array of a table."""

    slots: np.ndarray
    """(n,) int32, rising: rows of which at least one bit changes."""
    old: np.ndarray
    """(n, d), as the table stores them."""
    new: np.ndarray
    """(n, d), as the table stores them."""


Changes = dict[str, dict[str, RowChange]]
"""Changes by table and array, `values` or `pre_values`; arrays without a change are left out."""


def parse_edit(config: ModelConfig, text: str, field: str = "edit") -> Edit:
    """Returns the edit that a text describes, such as `ultramem_0:123=swap:456`.

    Args:
        config: the model's config.
        text: MEMORY:SLOT=ACTION, with `:` and a number, slot or file after some actions.
        field: name of the flag, for messages.

    Raises:
        UserError: another form, an unknown memory, a slot that its table does not have, or a file that holds
            no row.
    """
    place, equals, what = text.partition("=")
    name, colon, slot = place.rpartition(":")
    action, _, argument = what.partition(":")
    number = whole_number(slot)
    require(bool(equals and colon) and number is not None, field, text, _FORMS)
    if action not in get_args(Action):
        raise unknown(f"action of {field} = {text!r}:", action, get_args(Action))
    table = table_of(config, name)
    given = Edit(table, int(checked_slots(config, table, [number or 0])[0]), cast(Action, action))
    if action == "zero":
        require(not argument, field, text, _FORMS)
        return given
    if action == "scale":
        return given._replace(factor=_factor(field, text, argument))
    if action == "values":
        return given._replace(
            values=_row_file(argument, table_readers(config)[table][0].config.table.value_dim)
        )
    other = whole_number(argument)
    require(other is not None, field, text, _FORMS)
    return given._replace(other=int(checked_slots(config, table, [other or 0])[0]))


def _factor(field: str, text: str, argument: str) -> float:
    try:
        factor = float(argument)
    except ValueError:
        factor = math.nan
    require(math.isfinite(factor), field, text, f"{_FORMS}; FACTOR must be a finite number")
    return factor


def _row_file(path: str, width: int) -> np.ndarray:
    """Returns the row (width,) that a file holds; of a file that holds none only the header is read."""
    try:
        # A map allocates nothing: a broken header may name any shape.
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, OverflowError, tokenize.TokenError) as error:
        raise UserError(f"{path}: must be a .npy file with one row: {one_line(error)}") from None
    _check_row(path, found, (width,))
    return np.array(found)


def _check_row(field: str, row: np.ndarray, shape: tuple[int, ...]) -> None:
    require(row.shape == shape, f"{field}: shape", row.shape, f"must be {shape}, one row")
    require(row.dtype.kind in "fiu", f"{field}: dtype", str(row.dtype), "must be of real numbers")


def edit(config: ModelConfig, variables: Variables, edits: Sequence[Edit]) -> dict[str, ArrayTree]:
    """Returns the variables with edited rows; everything else is shared with the given ones.

    Edits are applied in order. Each table that changes is copied once.

    Args:
        config: the model's config.
        variables: its `params`, `memory` and `buffers`.
        edits: what to change.

    Raises:
        UserError: an unknown memory, slot or action, or values that do not fit a row or are not finite.
    """
    changes = row_changes(config, variables["memory"], edits)
    put = jax.jit(put_stored_rows)
    return dict(variables) | {"memory": _put(variables["memory"], changes, put)}


def row_changes(
    config: ModelConfig, tables: Mapping[str, Mapping[str, Any]], edits: Iterable[Edit]
) -> Changes:
    """Returns the rows that edits change, with their old and new bits; only these rows are read.

    Args:
        config: the model's config.
        tables: the collection `memory`.
        edits: what to change, in order.

    Raises:
        UserError: as for `edit`.
    """
    old: dict[tuple[str, str, int], np.ndarray] = {}
    new: dict[tuple[str, str, int], np.ndarray] = {}

    def row(table: str, part: str, slot: int) -> np.ndarray:
        key = table, part, slot
        if key not in new:
            there = take_stored_rows(tables[table][part], jnp.asarray([slot], jnp.int32))
            old[key] = new[key] = np.asarray(there)[0]
        return new[key]

    for one in edits:
        choice("action", one.action, get_args(Action))
        table = table_of(config, one.table)
        checked_slots(config, table, [one.slot, one.other])
        for part in tables[table]:
            before = row(table, part, one.slot)
            if one.action in ("copy", "swap"):
                other = row(table, part, one.other)
                if one.action == "swap":
                    new[table, part, one.other] = before
                new[table, part, one.slot] = other
            elif part == "values":
                new[table, part, one.slot] = _edited(one, before)
    return _collected(config, tables, old, new)


def _edited(one: Edit, stored: np.ndarray) -> np.ndarray:
    """Returns the stored bits of an edited row of values (d_v,)."""
    held = stored.view(jnp.bfloat16) if stored.dtype == np.uint16 else stored
    # What does not fit the dtype becomes infinite, and is refused below.
    with np.errstate(over="ignore", invalid="ignore"):
        if one.action == "values":
            given = np.asarray(one.values)
            _check_row("values", given, held.shape)
            wished = given.astype(np.float32)
        elif one.action == "zero":
            wished = np.zeros(held.shape, np.float32)
        else:
            wished = held.astype(np.float32) * np.float32(one.factor)
        rounded = wished.astype(held.dtype)
    finite = bool(np.isfinite(rounded.astype(np.float32)).all())
    require(finite, f"edited row {one.slot} of {one.table}", "not finite", "must have finite values")
    return rounded.view(stored.dtype)


def _collected(
    config: ModelConfig,
    tables: Mapping[str, Mapping[str, Any]],
    old: Mapping[tuple[str, str, int], np.ndarray],
    new: Mapping[tuple[str, str, int], np.ndarray],
) -> Changes:
    """Returns the rows whose bits differ, by table and array."""
    changes: Changes = {}
    for table in table_readers(config):
        for part in tables[table]:
            keys = sorted(key for key in new if key[:2] == (table, part))
            keys = [key for key in keys if old[key].tobytes() != new[key].tobytes()]
            if keys:
                slots = np.array([slot for _, _, slot in keys], np.int32)
                rows = (np.stack([of[key] for key in keys]) for of in (old, new))
                changes.setdefault(table, {})[part] = RowChange(slots, *rows)
    return changes


def _put(tables: Mapping[str, Mapping[str, Any]], changes: Changes, put: Any) -> dict[str, dict[str, Any]]:
    """Returns the tables with the new rows; `put` is a compiled `put_stored_rows`."""
    found = {table: dict(parts) for table, parts in tables.items()}
    for table, parts in changes.items():
        for part, change in parts.items():
            found[table][part] = put(found[table][part], jnp.asarray(change.slots), jnp.asarray(change.new))
    return found


def save_edited_run(
    workdir: str | Path, step: int, edits: Sequence[Edit], save_to: str | Path, tokenizer: Tokenizer
) -> Changes:
    """Writes the checkpoint of a run with edited rows as the checkpoint of a new run.

    The new run has the same step, config, corpus and position in the data, and the optimizers' state of the
    old one: moments stay with their slots. So it can be evaluated and sampled, and training continues from
    it. Its metrics up to the step are copied. It has no validation loss, because the edited model has not
    been evaluated.

    Args:
        workdir: folder of the run, which stays as it is.
        step: step of its checkpoint.
        edits: what to change, as for `edit`.
        save_to: folder of the new run, which must be new or empty.
        tokenizer: the run's tokenizer.

    Returns:
        The rows that differ between the two checkpoints. The folder appears whole or not at all.

    Raises:
        UserError: `save_to` is in use or cannot be written, there is no whole checkpoint of the step, or a
            wrong edit.
    """
    old, new = Path(workdir), Path(save_to)
    require(is_new_or_empty(new), "save_to", str(new), "must be a new or an empty folder")
    position = cast(PeekingIterator, _Position())
    with Checkpoints(old / "checkpoints", read_only=True) as checkpoints:
        meta = checkpoints.read_meta(step)
        config = saved_config(old / "checkpoints" / str(step), meta.config)
        # The state goes to one device, whatever the run was trained on.
        here = for_this_device(config)
        abstract = abstract_state(here, make_optimizers(here), one_device())
        state = checkpoints.restore(abstract, position, step).state
    changes = row_changes(config.model, state.tables, edits)
    put = jax.jit(put_stored_rows, donate_argnums=0)
    state = state.replace(tables=_put(state.tables, changes, put))
    with new_folder(new) as partial, Checkpoints(partial / "checkpoints") as saved:
        save_tokenizer(tokenizer, partial)
        if (old / METRICS_FILE).is_file():
            shutil.copyfile(old / METRICS_FILE, partial / METRICS_FILE)
            MetricWriter(partial, resume_step=step).close()  # drops what came after the checkpoint
        saved.save(step, state, position, meta.config, meta.corpus, since_record=meta.since_record)
    return changes


class _Position:
    """Carries a position in the data from one checkpoint to another, as an iterator that is not read."""

    def __init__(self) -> None:
        self._state: JsonDict = {}

    def get_state(self) -> JsonDict:
        """Returns the position."""
        return self._state

    def set_state(self, state: JsonDict) -> None:
        """Takes over a position."""
        self._state = state

    def start_prefetch(self) -> None:
        """Does nothing: no data is read."""
