"""Holds what the experiment measures, as JSON keeps it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ultramem_jax.files import replace_text
from ultramem_jax.reporting.records import keep_record, kept_record


@dataclass(frozen=True)
class Point:
    """Holds what a model knows after some steps of teaching."""

    step: int
    learned: float
    """Share in [0, 1] of the new facts that greedy decoding completes exactly, after a trained template."""
    learned_held_out: float
    """The same after templates that no text has."""
    learned_by_likelihood: float | None
    """Share of the new facts whose value is the likeliest of several; None where that was not measured."""
    learned_nats: float
    """Mean negative log-probability of the values of the new facts."""
    kept: float
    """Share of the facts taught before that greedy decoding completes exactly."""
    kept_nats: float
    """Mean negative log-probability of their values."""
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
class Teaching:
    """Holds one run: a system that is taught new people by one method."""

    system: str
    method: str
    rate: float
    """Peak of the learning rate."""
    slots: int
    """Rows of a table that a step may change; 0 is all that it read."""
    seed: int
    points: list[Point]
    """Measurements of the model, the first one before the first step."""
    seconds: float
    """Seconds of the run, with its evaluations."""

    def at(self, learned: float) -> Point | None:
        """Returns the first point at which so many new facts are learned; None if there is none."""
        return next((point for point in self.points if point.learned >= learned), None)

    def save(self, path: Path) -> None:
        """Writes the run to a file, which appears whole or not at all."""
        _save(self, path)

    @classmethod
    def load(cls, path: Path) -> "Teaching":
        """Reads a run that `save` wrote."""
        return cls.of(_load(path))

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "Teaching":
        """Returns the run of a record, as JSON keeps it."""
        return cls(**tree | {"points": [Point(**point) for point in tree["points"]]})


@dataclass(frozen=True)
class Sequel:
    """Holds lessons that one model took one after the other."""

    system: str
    method: str
    rate: float
    seed: int
    left: list[list[float]]
    """After each lesson, the share of the facts of this lesson and of all before that greedy decoding
    completes exactly, in the order of the lessons."""
    kept: list[float]
    """After each lesson, the share of the facts taught before the first one."""
    bits_per_byte: list[float]
    """Loss on other text, after each lesson."""

    def save(self, path: Path) -> None:
        """Writes the lessons to a file, which appears whole or not at all."""
        _save(self, path)

    @classmethod
    def load(cls, path: Path) -> "Sequel":
        """Reads lessons that `save` wrote."""
        return cls(**_load(path))


@dataclass(frozen=True)
class Study:
    """Holds all measurements, and where they were made."""

    environment: dict[str, str]
    """Strings from `describe_environment()`."""
    speeds: list[Speed]
    tunings: list[Teaching]
    """Runs by which rates were chosen."""
    teachings: list[Teaching]
    """Runs at the chosen rates, over seeds."""
    variants: list[Teaching]
    """Runs of variants of sparse memory fine-tuning."""
    sequels: list[Sequel]

    def with_parts_of(self, earlier: "Study") -> "Study":
        """Returns the study with what an earlier one has of other systems, and speeds if this has none."""
        return Study(
            self.environment,
            self.speeds or earlier.speeds,
            _with_others(self.tunings, earlier.tunings),
            _with_others(self.teachings, earlier.teachings),
            _with_others(self.variants, earlier.variants),
            _with_others(self.sequels, earlier.sequels),
        )

    def save(self, path: Path) -> Path:
        """Writes the study as JSON, completely or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        return keep_record(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Reads a file that `save` wrote.

        Raises:
            UserError: the file cannot be read, or is not a study.
        """
        with kept_record(path, "a study of forgetting") as read:
            return cls(
                dict(read["environment"]),
                [Speed(**record) for record in read["speeds"]],
                [Teaching.of(record) for record in read["tunings"]],
                [Teaching.of(record) for record in read["teachings"]],
                [Teaching.of(record) for record in read["variants"]],
                [Sequel(**record) for record in read["sequels"]],
            )


Record = TypeVar("Record", Teaching, Sequel)


def _with_others(records: list[Record], earlier: list[Record]) -> list[Record]:
    """Returns records after those of an earlier study that are of other systems."""
    systems = {record.system for record in records}
    return [record for record in earlier if record.system not in systems] + records


def _save(record: Teaching | Sequel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(dataclasses.asdict(record)))


def _load(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree
