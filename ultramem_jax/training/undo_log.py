"""Saves tables while training writes into them, without a copy: a fuzzy checkpoint and its undo log.

While a save is in flight, the background writer reads tables and moments in place (`LiveView`). So it writes
a mix of rows from before and after the steps that run meanwhile. Each of these steps hands over the rows that
it overwrites, as they were (`RowsBefore`). If several steps wrote a row, the first record counts: it is the
row at the step of the save. Once all arrays are read, the log goes into the checkpoint, before that is
committed. A restore puts the rows of the log back (`UndoRows`).

XLA does not know of this reader. If it did, it would not let the tables be donated, and the next step would
write into a copy of all of them. So the log must keep their buffers alive: it refers to the newest state, and
holds Ctrl-C back between a step and its record.
"""

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from ultramem_jax.training.large_arrays import array_name
from ultramem_jax.tree_types import ArrayTree

LIVE_BYTES = 256 * 2**20
"""Total bytes of tables and moments below which a save needs no log, because XLA's copy is cheap."""
_LOG_SHARE = 0.2
"""Largest size of a log, as a share of the bytes of tables and moments. Beyond it, training waits for the
writer."""


class RowsBefore(NamedTuple):
    """Holds the rows that a step writes into one array of a table, as they were before the step."""

    slots: jax.Array
    """(U,) int32, increasing, without repeats. Slots of N and above are padding."""
    rows: tuple[jax.Array, ArrayTree]
    """Rows (U, ...) of the array, and of its moments."""


RowsOverwritten: TypeAlias = Mapping[str, Mapping[str, RowsBefore]]
"""Rows that a step overwrote, per table and array of it."""


class LiveView(np.ndarray):
    """Views an array's own memory.

    It is valid while the buffer lives, whichever `jax.Array` it is donated to.
    """

    @classmethod
    def of(cls, array: jax.Array) -> "LiveView":
        """Returns the view of an array (any shape) on a CPU."""
        memory: Any = (ctypes.c_ubyte * array.nbytes).from_address(array.unsafe_buffer_pointer())
        return np.frombuffer(memory, np.uint8).view(array.dtype).reshape(array.shape).view(cls)

    def __deepcopy__(self, memo: dict[int, object] | None) -> "LiveView":
        return self  # Orbax deep-copies its input to protect it from changes; here the changes are wanted


def is_worth_it(tables: ArrayTree, moments: ArrayTree) -> bool:
    """Returns whether a log is worth it: the arrays are large, and each is whole on one CPU device.

    From an accelerator Orbax copies them anyway.
    """
    arrays = jax.tree.leaves((tables, moments))
    alone = all(a.is_fully_addressable and len(a.devices()) == 1 for a in arrays)
    on_cpu = all(d.platform == "cpu" for a in arrays for d in a.devices())
    return alone and on_cpu and sum(a.nbytes for a in arrays) >= LIVE_BYTES


class UndoLog:
    """Holds the undo log of one save.

    The training thread records; the writer's thread closes and writes it.
    """

    def __init__(self, tables: ArrayTree, moments: ArrayTree):
        self._arrays = _by_name(tables, moments)
        jax.block_until_ready(self._arrays)  # no record would cover what an earlier step still writes
        self._addresses = {name: a.unsafe_buffer_pointer() for name, a in self._arrays.items()}
        self._limit = _LOG_SHARE * sum(a.nbytes for a in self._arrays.values())
        parts = [(name, part, a) for name, table in tables.items() for part, a in table.items()]
        self._recorded = {(name, part): np.zeros(len(a), bool) for name, part, a in parts}
        self._entries: dict[str, np.ndarray] = {}
        self._num_bytes, self._num_steps = 0, 0
        self._changed = threading.Condition()
        self._in_step = self._closed = self._broken = False

    @property
    def full(self) -> bool:
        """Tells whether training must wait for the writer."""
        return self._num_bytes > self._limit

    @contextlib.contextmanager
    def step(self) -> Iterator["UndoLog | None"]:
        """Surrounds a step that calls `record`.

        It gives None if all arrays are read and no record is needed.
        """
        with _interrupts_held_back():
            with self._changed:
                self._in_step = not self._closed
            if not self._in_step:
                yield None
                return
            steps = self._num_steps
            try:
                yield self
            finally:
                with self._changed:
                    self._in_step = False
                    self._broken |= self._num_steps == steps
                    self._changed.notify_all()

    def record(self, tables: ArrayTree, moments: ArrayTree, before: RowsOverwritten) -> None:
        """Records a step: the state after it, and the rows before it.

        Raises:
            RuntimeError: the tables have moved in memory, because something kept them from being donated.
        """
        self._arrays = jax.block_until_ready(_by_name(tables, moments))
        moved = [
            name for name, a in self._arrays.items() if a.unsafe_buffer_pointer() != self._addresses[name]
        ]
        if moved:
            raise RuntimeError(f"not updated in place while a save reads them: {', '.join(moved)}")
        for name, parts in before.items():
            for part, (slots, rows) in parts.items():
                self._append(name, part, np.asarray(slots), _by_name(*({name: {part: r}} for r in rows)))
        self._num_steps += 1

    def _append(self, name: str, part: str, slots: np.ndarray, rows: dict[str, jax.Array]) -> None:
        recorded = self._recorded[name, part]
        (new,) = np.nonzero(slots < len(recorded))
        new = new[~recorded[slots[new]]]
        if not len(new):
            return
        recorded[slots[new]] = True
        entries = {f"{name}.{part}": slots[new]}
        for leaf, values in rows.items():
            # As bytes, because NumPy's files do not support bfloat16.
            entries[leaf] = np.ascontiguousarray(np.asarray(values)[new]).reshape(len(new), -1).view(np.uint8)
        self._entries |= {f"{self._num_steps}/{entry}": array for entry, array in entries.items()}
        self._num_bytes += sum(array.nbytes for array in entries.values())

    def close(self) -> None:
        """Waits for the current step, the last to be recorded.

        The writer calls it once it has read all arrays.

        Raises:
            RuntimeError: a step failed, and what it overwrote is lost.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._in_step)
            self._closed = True
        if self._broken:
            raise RuntimeError("a step failed while the checkpoint was written")

    def write(self, file: Path) -> None:
        """Writes the log as an `.npz` that `UndoRows` reads. It writes nothing if no step was recorded."""
        if self._entries:
            np.savez(file, **self._entries)  # type: ignore[arg-type]


class UndoRows:
    """Reads the log of a checkpoint, whose rows a restore puts back.

    It is empty if the checkpoint has no log.
    """

    def __init__(self, file: Path):
        self._file = file
        self._steps: dict[str, list[str]] = {}
        if file.is_file():
            with np.load(file) as log:
                for step, name in (entry.split("/") for entry in log):
                    self._steps.setdefault(name, []).append(step)

    def __contains__(self, name: str) -> bool:
        return name in self._steps

    def read(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the recorded rows of an array: per step, slots (U,), increasing, and rows as bytes.

        Args:
            name: the dotted name of the array in the train state.
        """
        if name not in self:
            return []
        slots = ".".join(name.split(".")[1:3])  # the table and the array of it
        with np.load(self._file) as log:
            return [(log[f"{step}/{slots}"], log[f"{step}/{name}"]) for step in self._steps[name]]


def put_back(
    piece: np.ndarray,
    place: tuple[slice, ...],
    shape: tuple[int, ...],
    undo: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Writes rows from `UndoRows.read` into `piece`.

    Args:
        piece: a part of an array, changed in place.
        place: where the part lies in the array.
        shape: shape of the whole array.
        undo: the rows.
    """
    for slots, rows in undo:
        first, last = np.searchsorted(slots, [place[0].start, place[0].stop])
        whole = rows[first:last].view(piece.dtype).reshape(last - first, *shape[1:])
        piece[slots[first:last] - place[0].start] = whole[:, *place[1:]]


def _by_name(tables: ArrayTree, moments: ArrayTree) -> dict[str, jax.Array]:
    """Returns the arrays by their dotted names in the train state. A checkpoint uses the same names."""
    tree = {"tables": tables, "table_state": moments}
    return {array_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block.

    An interrupt would drop a step's result, which is the only owner of buffers that are being read.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = []
    previous = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        if previous is not None:  # None stands for a handler that Python does not know
            signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)
