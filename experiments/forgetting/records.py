"""Holds what the experiment measures, as JSON keeps it."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ultramem_jax.config import run_config_from_dict, to_dict
from ultramem_jax.errors import UserError
from ultramem_jax.files import replace_text
from ultramem_jax.reporting.records import kept_record
from ultramem_jax.tree_types import JsonDict


@dataclass(frozen=True)
class Point:
    """Holds what a model knows after some steps of fine-tuning."""

    step: int
    learned: float
    """Share in [0, 1] of the new facts that greedy decoding completes exactly, after a trained template."""
    learned_held_out: float
    """Share of the new facts that greedy decoding completes exactly, after a template that no text has."""
    learned_nats: float
    """Mean negative log-probability of the values of the new facts."""
    kept: float
    """Share of the facts taught before that greedy decoding completes exactly."""
    kept_nats: float
    """Mean negative log-probability of the values of the facts taught before."""
    bits_per_byte: float
    """Loss on text that has nothing to do with the facts."""


@dataclass(frozen=True)
class Speed:
    """Holds the time of a training step."""

    slots: int
    """N."""
    selection: str
    """Score by which rows are selected, or `all rows`."""
    ms: float
    """Median of the step, in milliseconds."""
    ratio: float
    """Median of the ratios to the step that changes all rows it read, of the same round."""
    temporary_bytes: int | None
    """Bytes of the step's temporaries, as the compiler planned them."""


@dataclass(frozen=True)
class FineTuning:
    """Holds one run: a system that is taught new people by one method."""

    system: str
    method: str
    rate: float
    """Peak of the learning rate."""
    slots: int
    """Rows of a table that a step may change; 0 is all that it read."""
    seed: int
    enough: float
    """Share of the new facts at which it ends."""
    points: list[Point]
    """Measurements of the model, the first one before the first step. All numbers are finite."""
    diverged: bool
    """Whether it ended because a loss was not finite."""
    seconds: float
    """Seconds of the run, with its evaluations."""

    @property
    def is_enough(self) -> bool:
        """Tells whether so many facts are learned as were wanted."""
        return self.at(self.enough) is not None and not self.diverged

    @property
    def end(self) -> Point:
        """Returns the point at which enough is learned, see `at`; the last one where that never comes."""
        return self.at(self.enough) or self.points[-1]

    @property
    def lost(self) -> float | None:
        """Returns the net share of the facts known before that are not known at the end; None if none was."""
        before, after = self.points[0].kept, self.end.kept
        return 1 - after / before if before else None

    @property
    def risen(self) -> float:
        """Returns by how much the loss on other text has risen at the end, in bits per byte."""
        return self.end.bits_per_byte - self.points[0].bits_per_byte

    def at(self, learned: float) -> Point | None:
        """Returns the first point at which so many new facts are learned; None if there is none.

        It lies on the line between the measurement before and the one after.
        """
        if self.points[0].learned >= learned:
            return self.points[0]
        for before, after in itertools.pairwise(self.points):
            if after.learned >= learned:
                part = (learned - before.learned) / (after.learned - before.learned)
                names = (field.name for field in dataclasses.fields(Point))
                both = ((name, getattr(before, name), getattr(after, name)) for name in names)
                between = {name: low + part * (high - low) for name, low, high in both}
                return Point(**between | {"step": round(between["step"]), "learned": learned})
        return None

    @classmethod
    def of(cls, tree: JsonDict) -> "FineTuning":
        """Returns the run of a record, as JSON keeps it."""
        return cls(**tree | {"points": [Point(**point) for point in tree["points"]]})


@dataclass(frozen=True)
class TaskSequence:
    """Holds tasks that one model took one after the other; those after a divergence are left out."""

    system: str
    method: str
    rate: float
    seed: int
    tasks: int
    """How many it was to take."""
    left: list[list[float]]
    """After each task, the share of the facts of this task and of all before that greedy decoding
    completes exactly, in the order of the tasks."""
    kept: list[float]
    """After each task, the share of the facts taught before the first one."""
    bits_per_byte: list[float]
    """Loss on other text, after each task."""

    @property
    def is_whole(self) -> bool:
        """Tells whether the model took all tasks."""
        return len(self.left) == self.tasks

    @classmethod
    def of(cls, tree: JsonDict) -> "TaskSequence":
        """Returns the sequence of a record, as JSON keeps it."""
        return cls(**tree)


@dataclass(frozen=True)
class Setup:
    """Describes a system before it is taught."""

    system: str
    words: str
    """Model, training and tasks, in words."""
    settings: JsonDict
    """All that decides what the model is and what it is taught, but for the methods and their learning rates:
    `runs` has the configs of its training before, `setting` the rest."""
    sha256: str
    """Hash of an open model's file; blank for other models."""
    without_memory: float | None
    """Bits per byte of the open model alone on the other text; None for a model that was never without."""
    with_memory: float | None
    """Bits per byte of the open model with its memory, which was trained alone on such text."""

    def is_as(self, other: "Setup") -> bool:
        """Tells whether two systems are made and taught in the same way, which may be on two machines."""
        return (self.system, self.settings, self.sha256) == (other.system, other.settings, other.sha256)

    @classmethod
    def of(cls, tree: JsonDict) -> "Setup":
        """Returns the setup of a record, as JSON keeps it; newer fields of configs get their defaults."""
        runs = [to_dict(run_config_from_dict(run)) for run in tree["settings"]["runs"]]
        return cls(**tree | {"settings": tree["settings"] | {"runs": runs}})


Kept = TypeVar("Kept", FineTuning, TaskSequence)


def keep(record: FineTuning | TaskSequence, path: Path, identity: JsonDict) -> None:
    """Writes a record, with all that decides it, to a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"identity": identity, "record": dataclasses.asdict(record)}))


def kept(path: Path, identity: JsonDict, of: Callable[[JsonDict], Kept]) -> Kept:
    """Returns a record that `keep` wrote.

    Args:
        path: the file.
        identity: all that decides the record; `run` is the config of a run.
        of: makes the record from what JSON keeps of it.

    Raises:
        UserError: something else has decided it, or the file is broken.
    """
    with kept_record(path, "a record of forgetting") as read:
        then: JsonDict = dict(read["identity"])
        record = of(read["record"])
        # Fields that its config did not have yet get their defaults.
        then["run"] = to_dict(run_config_from_dict(then["run"]))
    changed = [name for name in sorted({*then, *identity}) if then.get(name) != identity.get(name)]
    if changed:
        raise UserError(f"{path}: was made with another {', '.join(changed)}; give another --workdir")
    return record
