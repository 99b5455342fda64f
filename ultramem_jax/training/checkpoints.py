"""Saves and restores the checkpoints of a run.

Only this file, `checkpoint_reading.py` and `large_arrays.py` know their format. A checkpoint of step 250 is
the directory `<workdir>/checkpoints/250`:

    state/          the train state, arrays cut into chunks (Orbax's own format)
    undo.npz        rows of large tables to be put back, where steps ran during the save (`undo_log.py`)
    data/           the position of the data iterator, which is the same for any number of processes
    meta/           JSON: the run's configuration, its corpus and tokenizer, library versions
    manifest.json   the size and a checksum of every file above

Beside them `validation_losses.json` ranks the checkpoints that were evaluated. A run saves first and then
evaluates, so that a failed evaluation loses no step.

A checkpoint is written in `250.orbax-checkpoint-tmp`, and renamed when all of it is there, manifest included.
So a process that is killed while it saves leaves a directory that nothing reads, and the next run removes it.
Later damage (a truncated or deleted file, a kill while an old checkpoint is being deleted) shows when the
files are compared with the manifest. The comparison is needed, because TensorStore reads a missing chunk as
zeros.

Several processes save and restore together, into one folder that all reach. Each handles its own parts of the
arrays. The first process writes the rest, lists the checkpoints, and checks that they are whole.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import platform
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

import ultramem_jax
from ultramem_jax.data import PeekingIterator
from ultramem_jax.errors import UserError, whole_number
from ultramem_jax.parallel import distributed
from ultramem_jax.training.checkpoint_ranks import NewestAndBest, by_loss, read_losses, write_losses
from ultramem_jax.training.checkpoint_reading import (
    UNDO_LOG,
    Meta,
    load_meta,
    read_state,
    require_same_model,
)
from ultramem_jax.training.manifest import find_damage, write_manifest
from ultramem_jax.training.refusals import refusal
from ultramem_jax.training.undo_log import LiveView, UndoLog
from ultramem_jax.tree_types import ArrayTree, JsonDict

log = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BYTES = 8 * 2**20
"""Size of the chunks into which arrays are cut. Chunks are written in parallel, and a restore onto another
mesh reads only the chunks of its own shards. By default Orbax writes one chunk per shard, however large."""

POSITION = "process_0-of-1.json"
"""Name of the file with the position in the data. It is Grain's name in a run of one process."""
_TIMEOUT_SECONDS = 24 * 3600
"""Timeout of a save. Orbax's own is ten minutes, which 16 GB take on a slow disk."""

_REASON_CHARACTERS = 200
"""Longest reason in a message. TensorStore appends its whole specification of an array to every error."""

_ABANDONED: list[UndoLog] = []
"""Logs of failed saves. They keep alive the buffers that a writer may still be reading."""


@dataclass(frozen=True)
class Restored:
    """Holds a state that was restored."""

    state: ArrayTree
    step: int
    meta: Meta
    skipped: tuple[tuple[int, str], ...] = ()
    """Newer checkpoints that are not whole: (step, reason), newest first."""


class Checkpoints:
    """Manages the checkpoints of one run, and saves in the background.

    Use it as a context manager: leaving it waits. It keeps the newest `keep_last` checkpoints, and the
    `keep_best` of lowest validation loss (`mark`). A checkpoint without a validation loss, or with one that
    is not finite, is kept only by recency. A checkpoint that a later mark surpasses is deleted by the next
    save, or when the checkpoints are closed.

    Only the first save deletes what killed saves left behind. A process that saves must own the run's folder
    (`workdir.owned`). A process that only reads need not own it, and deletes nothing.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep_last: int = 2,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        """Opens `directory`, creating it unless `read_only`.

        Raises:
            UserError: `read_only` is set, and there is no such directory.
            OSError: the directory cannot be created.
        """
        self.directory = Path(os.path.abspath(directory))
        if read_only and not self.directory.is_dir():
            raise UserError(f"no checkpoints: there is no directory {self.directory}")
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        # A process may read on its own while the others do something else.
        self._together = not read_only
        losses, unknown = self._agreed(self._losses_on_disk)
        self._losses = {step: loss for step, loss in losses}
        self._position: int | None = None  # the step that this object last restored or saved
        self._saving = -1
        self._log: UndoLog | None = None  # of the save in flight, if training may write into what it reads
        policy = NewestAndBest(keep_last, keep_best, self._losses, frozenset(unknown))
        self._policy = None if read_only else policy
        self._marked = False
        self._manager: ocp.CheckpointManager | None = None  # opened by the first save

    def _open_manager(self, policy: NewestAndBest) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            epath.Path(self.directory),
            item_handlers={
                # Compression takes ten times the CPU time of all else, and saves 8 % of random numbers. It
                # may also spoil rows that no step wrote: it refers to other rows, which may change meanwhile.
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "meta": ocp.JsonCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(filename=POSITION),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                cleanup_tmp_directories=True,
                # Orbax's own reading of metadata and metrics fails on a damaged checkpoint, so that a run
                # could not even start. `_losses` above is read instead, and tolerates damage.
                lightweight_initialize=True,
                async_options=ocp.AsyncOptions(
                    timeout_secs=_TIMEOUT_SECONDS, post_finalization_callback=self._finish
                ),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and jax.process_count() > 1:
            return  # closing waits for the other processes, which may be elsewhere
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            log.error("the save in flight failed: %s", failure)  # most likely caused by `error`

    def close(self) -> None:
        """Waits for the save in flight, deletes what need not be kept, and ends the background threads."""
        if self._policy is not None and (self._manager is not None or self._marked):
            self.wait()
            manager = self._manager or self._open_manager(self._policy)
            steps = manager.all_steps()
            for step in sorted(set(steps) - self._policy.kept(steps)):
                manager.delete(step)
            manager.close()
        self._manager = self._policy = None

    def wait(self) -> None:
        """Blocks until the save in flight is on disk.

        Raises:
            OSError: the system refused to write it (a full disk, say).
            Exception: any other failure of the save.
        """
        if self._manager is None:
            return
        with self._failing_in_a_line(self._saving):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failing_in_a_line(self, step: int) -> Iterator[None]:
        """Turns what the system refused to a save into an `OSError` of one line."""
        try:
            yield
        except Exception as error:
            self._abandon_log()
            refused = refusal(error)
            if refused is None:
                raise
            steps = self.all_steps()
            kept = (
                f"the last whole checkpoint is that of step {steps[-1]}" if steps else "there is none before"
            )
            message = f"the checkpoint of step {step} cannot be saved: {refused[1]}; {kept}"
            raise OSError(refused[0], message, str(self.directory)) from error

    @contextlib.contextmanager
    def recorded_step(self) -> Iterator[UndoLog | None]:
        """Surrounds each step after a save with `recorded`. It gives the log to record the step in, or None.

        Leaving it waits for the writer where the log has grown too long.
        """
        undo_log = self._log
        if undo_log is None:
            yield None
            return
        with undo_log.step() as open_log:
            yield open_log
        if undo_log.full:
            self.wait()

    def all_steps(self) -> list[int]:
        """Returns the steps with a committed checkpoint, increasing. A save in flight counts after `wait`."""
        if not self.directory.is_dir():
            return []
        return sorted(n for path in self.directory.iterdir() if (n := whole_number(path.name)) is not None)

    def latest_step(self) -> int | None:
        """Returns the newest of `all_steps`, or None. It is not checked for damage."""
        return self._agreed(lambda: max(self.all_steps(), default=None))

    def best_step(self) -> int | None:
        """Returns the step of lowest validation loss among `all_steps`, the newest of equals, or None."""
        ranking = by_loss(self._losses, self.all_steps())
        return ranking[0] if ranking else None

    # ---- writing

    def save(
        self,
        step: int,
        state: ArrayTree,
        data_iterator: grain.DatasetIterator | PeekingIterator | None,
        config: JsonDict,
        corpus: JsonDict,
        validation_loss: float | None = None,
        *,
        since_record: dict[str, float] | None = None,
        recorded: bool = False,
    ) -> None:
        """Saves in the background. It waits first for a save that is still in flight.

        The state's buffers may be donated as soon as this returns. On an accelerator they have been copied to
        the host by then. On CPU Orbax reads them in place. XLA knows that they are being read, and gives the
        computation to which they are donated a copy: the first step after a save needs that much more memory.
        With `recorded`, this does not hold for tables: they may be updated in place, in a `recorded_step`.

        Args:
            step: must be above every step in the directory. Exempt are steps of a later part of the run that
                this object was restored before (damaged ones that were skipped, say): these are deleted.
            state: nested dicts, dataclasses of `flax.struct`, named tuples of optax; leaves are arrays.
            data_iterator: a `grain.DatasetIterator`, whose position is saved; or None.
            config: the run's configuration, from `ultramem_jax.config.to_dict`.
            corpus: what identifies the data (its hash and the like), for JSON.
            validation_loss: the loss for `mark`, where it is known already.
            since_record: sums with which the run's next record begins, see `Meta.since_record`.
            recorded: `state` is a `TrainState` whose tables lie on one CPU (`undo_log.is_worth_it`), and
                every step to which it is donated is a `recorded_step`.

        Raises:
            UserError: there is a checkpoint of this step or a later one, of a run that was not restored.
            OSError: the system refused to write this save or the one before it, or the directory was deleted.
            Exception: any other failure of the save before this one.
        """
        if self._policy is None:
            raise RuntimeError("these checkpoints are closed, or open only for reading")
        self.wait()
        with self._failing_in_a_line(step):
            os.stat(self.directory)  # Orbax would create it again, without what the run has written
            if self._manager is None:
                self._manager = self._open_manager(self._policy)
        self._drop_later_than_position(self._manager, step)
        meta = Meta(step, config, corpus, _versions(), since_record=since_record or {})
        undo_log = None
        if recorded:
            undo_log = UndoLog(state.tables, state.table_state)
            live = jax.tree.map(LiveView.of, {"tables": state.tables, "table_state": state.table_state})
            state = state.replace(**live)
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
        items: dict[str, ocp.args.CheckpointArgs] = {
            "state": ocp.args.PyTreeSave(state, save_args=save_args),
            "meta": ocp.args.JsonSave(dataclasses.asdict(meta)),
        }
        if data_iterator is not None:
            items["data"] = ocp.args.JsonSave(dict(data_iterator.get_state()))
        self._forget_losses_from(step)
        self._saving = self._position = step
        self._log = undo_log
        with self._failing_in_a_line(step):
            # Without `force`, Orbax silently skips a step that is not above all steps it knows.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        if validation_loss is not None:
            self.mark(step, validation_loss)

    def mark(self, step: int, validation_loss: float) -> None:
        """Ranks the checkpoint of `step`, which may still be in flight, by its validation loss.

        Raises:
            OSError: the loss cannot be written down.
        """
        self._losses[step] = float(validation_loss)
        self._marked = True
        self._write_losses()

    def _forget_losses_from(self, step: int) -> None:
        """Drops the losses that an earlier run of these steps left."""
        stale = [old for old in self._losses if old >= step]
        for old in stale:
            del self._losses[old]
        if stale:
            self._write_losses()

    def _write_losses(self) -> None:
        if distributed.is_first():
            write_losses(self.directory, self._losses, [*self.all_steps(), self._saving])

    def is_marked(self, step: int) -> bool:
        """Returns whether the validation loss of the checkpoint of `step` is known."""
        return step in self._losses

    def _drop_later_than_position(self, manager: ocp.CheckpointManager, step: int) -> None:
        later = [old for old in manager.all_steps() if old >= step]
        if not later:
            return
        if self._position is None or step <= self._position:
            raise UserError(
                f"cannot save step {step}: {self.directory} already holds {_steps(later)};"
                " resume from there or choose another directory"
            )
        log.warning(
            "deleting %s of %s: this run went on from step %d", _steps(later), self.directory, self._position
        )
        for old in later:
            manager.delete(old)

    def _finish(self) -> None:
        """Finishes a checkpoint that is written and not yet renamed.

        Orbax calls it in its thread, in only one process.
        """
        target = self.directory / str(self._saving)
        if not target.is_dir():
            (target,) = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        undo_log, self._log = self._log, None
        if undo_log is not None:
            undo_log.close()
            undo_log.write(target / UNDO_LOG)
        write_manifest(target)

    def _abandon_log(self) -> None:
        if self._log is not None:  # one array could not be written, but others may still be read
            _ABANDONED.append(self._log)
            self._log = None

    # ---- reading

    def read_meta(self, step: int | None = None) -> Meta:
        """Returns the `Meta` of `step`, or of the newest whole checkpoint. Errors are those of `restore`."""
        return self._read(step, lambda directory, meta: meta)[1]

    def restore(
        self,
        abstract_state: ArrayTree,
        data_iterator: grain.DatasetIterator | PeekingIterator | None = None,
        step: int | None = None,
        expect_config: JsonDict | None = None,
    ) -> Restored:
        """Reads the state of `step`, or of the newest whole checkpoint.

        A newer one that is damaged is skipped with a warning in the log; see `Restored.skipped`.

        Args:
            abstract_state: the state's structure with `jax.ShapeDtypeStruct` leaves. A leaf with a sharding
                is restored onto it, whatever mesh it was saved from. A leaf without one goes to the first
                device.
            data_iterator: set to the saved position, if given.
            step: reads only this step.
            expect_config: a run's configuration; the checkpoint's `model` and `data.tokenizer` must equal it.

        Raises:
            UserError: no checkpoint, none that is whole, one of another model, or a state of other entries,
                shapes or dtypes than `abstract_state`.
        """

        def read(directory: Path, meta: Meta) -> ArrayTree:
            if expect_config is not None:
                require_same_model(directory, meta.config, expect_config)
            state = read_state(directory, abstract_state, partial=False)
            if data_iterator is not None:
                data_iterator.set_state(json.loads((directory / "data" / POSITION).read_text()))
                data_iterator.start_prefetch()
            return state

        restored = self._restored(step, read)
        self._position = restored.step
        return restored

    def restore_subtree(self, abstract_subtree: dict[str, ArrayTree], step: int | None = None) -> Restored:
        """Reads only some top-level entries of the state, such as `{"params": ...}`.

        Arguments and errors are those of `restore`. `Restored.state` is a dict of the same entries.
        """
        return self._restored(
            step, lambda directory, meta: read_state(directory, abstract_subtree, partial=True)
        )

    def _restored(self, step: int | None, read: Callable[[Path, Meta], ArrayTree]) -> Restored:
        state, meta, skipped = self._read(step, read)
        return Restored(state, meta.step, meta, skipped)

    def _read(
        self, step: int | None, read: Callable[[Path, Meta], T]
    ) -> tuple[T, Meta, tuple[tuple[int, str], ...]]:
        """Applies `read` to the newest checkpoint that is whole and that it can read.

        If one process cannot read a checkpoint, none of them uses it.
        """
        self.wait()
        skipped: list[tuple[int, str]] = []
        cause: Exception | None = None
        for candidate in self._candidates(step):
            directory = self.directory / str(candidate)
            result, failure = None, None
            try:
                if (damage := self._agreed(functools.partial(find_damage, directory))) is not None:
                    raise _Damaged(damage)
                meta = dataclasses.replace(load_meta(directory), validation_loss=self._losses.get(candidate))
                result = read(directory, meta), meta, tuple(skipped)
            except (UserError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # this is not the checkpoint's fault, and an older one would fail in the same way
            except Exception as error:
                # It is so broad because Orbax and TensorStore raise Exception, ValueError, KeyError, OSError.
                cause = error
                failure = textwrap.shorten(str(error) or type(error).__name__, _REASON_CHARACTERS)
            failures = distributed.gather(failure) if self._together else [failure]
            reason = next((reason for reason in failures if reason is not None), None)
            if reason is None:
                assert result is not None
                return result
            skipped.append((candidate, reason))
            if step is None:
                log.warning("skipping damaged checkpoint %s: %s", directory, reason)
        reasons = "; ".join(f"step {bad}: {reason}" for bad, reason in skipped)
        raise UserError(f"no whole checkpoint in {self.directory}: {reasons}") from cause

    def _candidates(self, step: int | None) -> list[int]:
        steps = self._agreed(self.all_steps)
        if not steps:
            raise UserError(f"no checkpoints in {self.directory}")
        if step is None:
            return steps[::-1]
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}: it holds {_steps(steps)}")
        return [step]

    def _agreed(self, look: Callable[[], T]) -> T:
        """Returns what the first process sees, where several look together.

        A disk may show two processes different states.
        """
        return distributed.look_in_first(look) if self._together else look()

    def _losses_on_disk(self) -> tuple[list[tuple[int, float]], list[int]]:
        """Returns validation losses by step, and the steps whose losses are lost.

        Older versions kept a loss inside its checkpoint.
        """
        losses: dict[int, float] = {}
        steps = self.all_steps()
        for step in steps:
            try:
                loss = load_meta(self.directory / str(step)).validation_loss
            except Exception:  # a damaged one has no rank, and `restore` will say what is wrong with it
                continue
            if loss is not None:
                losses[step] = loss
        marks = read_losses(self.directory)
        lost = [step for step in steps if step not in losses] if marks is None else []
        return list((losses | (marks or {})).items()), lost


class _Damaged(Exception):
    """Reports a checkpoint that differs from its manifest."""


def _steps(steps: Sequence[int]) -> str:
    return f"checkpoint{'s' if len(steps) > 1 else ''} of step {', '.join(map(str, steps))}"


def _versions() -> dict[str, str]:
    libraries = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "ultramem_jax": ultramem_jax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }
