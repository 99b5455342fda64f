"""Holds all measurements of the experiment, and joins those of several calls of its command."""

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from experiments.forgetting.records import FineTuning, Setup, Speed, TaskSequence
from ultramem_jax.reporting.records import keep_record, kept_record


@dataclass(frozen=True)
class Environment:
    """Says where parts of a study were measured."""

    strings: dict[str, str]
    """From `describe_environment()`."""
    parts: list[str]
    """Names of the parts, see `Study.parts`."""


@dataclass(frozen=True)
class Study:
    """Holds all measurements, and where they were made."""

    environments: list[Environment] = field(default_factory=list)
    setups: list[Setup] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    tunings: list[FineTuning] = field(default_factory=list)
    """Runs by which rates were chosen."""
    runs: list[FineTuning] = field(default_factory=list)
    """Runs at the chosen rates, over seeds."""
    variants: list[FineTuning] = field(default_factory=list)
    """Runs of variants of sparse memory fine-tuning."""
    sequences: list[TaskSequence] = field(default_factory=list)

    def parts(self) -> dict[str, list[object]]:
        """Returns what was measured by the name of its part: `speed`, or a system and what it was for."""
        parts: dict[str, list[object]] = {"speed": list(self.speeds)} if self.speeds else {}
        kinds: dict[str, list[FineTuning] | list[TaskSequence]] = {
            "learning rates": self.tunings,
            "comparison": self.runs,
            "variants": self.variants,
            "sequence": self.sequences,
        }
        for kind, records in kinds.items():
            for record in records:
                parts.setdefault(f"{record.system}, {kind}", []).append(record)
        return parts

    def measured_in(self, strings: dict[str, str]) -> "Study":
        """Returns the study as measured in one environment, see `describe_environment`."""
        return dataclasses.replace(self, environments=[Environment(strings, list(self.parts()))])

    def of(self, setup: Setup) -> "Study":
        """Returns what was measured of a system, if it was prepared in this way."""
        setups = [known for known in self.setups if known.is_as(setup)]
        systems = {known.system for known in setups}

        def those(records: list[Record]) -> list[Record]:
            return [record for record in records if record.system in systems]

        parts = those(self.tunings), those(self.runs), those(self.variants), those(self.sequences)
        return Study([], setups, [], *parts)

    def with_parts_of(self, earlier: "Study") -> "Study":
        """Returns the study with what an earlier one has beside it.

        That is all of other systems, and speeds if it has none. Of its own systems, if they are as they were
        (see `Setup.is_as`), it is what methods have that it has not measured, and of those that it has, runs
        with other seeds at the same learning rate.
        """
        now = {setup.system: setup for setup in self.setups}
        other = {of.system for of in earlier.setups if not now.get(of.system, of).is_as(of)}
        together = Study(
            [],
            _with_earlier(self.setups, earlier.setups, other, lambda setup: setup.system),
            self.speeds or earlier.speeds,
            _with_earlier(self.tunings, earlier.tunings, other, _method),
            _with_earlier(self.runs, earlier.runs, other, _method, _is_another_seed),
            _with_earlier(self.variants, earlier.variants, other, _method, _is_another_seed),
            _with_earlier(self.sequences, earlier.sequences, other, _method, _is_another_seed),
        )
        return dataclasses.replace(together, environments=_environments(self, earlier, together))

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
                [Environment(**record) for record in read["environments"]],
                [Setup.of(record) for record in read["setups"]],
                [Speed(**record) for record in read["speeds"]],
                [FineTuning.of(record) for record in read["tunings"]],
                [FineTuning.of(record) for record in read["runs"]],
                [FineTuning.of(record) for record in read["variants"]],
                [TaskSequence.of(record) for record in read["sequences"]],
            )


Record = TypeVar("Record", Setup, FineTuning, TaskSequence)


def _with_earlier(
    records: list[Record],
    earlier: list[Record],
    other: set[str],
    subject: Callable[[Record], Hashable],
    stand_beside: Callable[[Record, Record], bool] = lambda *_: False,
) -> list[Record]:
    """Returns records after those of an earlier study that they do not replace.

    Args:
        records: the later records.
        earlier: the earlier ones.
        other: systems whose earlier records are left out.
        subject: returns what a record is about. A later one replaces the earlier ones of its subject.
        stand_beside: tells of an earlier and a later record whether it does not.
    """

    def stays(record: Record) -> bool:
        later = (of for of in records if subject(of) == subject(record))
        return record.system not in other and all(stand_beside(record, of) for of in later)

    return [record for record in earlier if stays(record)] + records


def _method(run: FineTuning | TaskSequence) -> Hashable:
    return run.system, run.method


def _is_another_seed(run: FineTuning | TaskSequence, other: FineTuning | TaskSequence) -> bool:
    tasks = {of.tasks for of in (run, other) if isinstance(of, TaskSequence)}
    return run.rate == other.rate and run.seed != other.seed and len(tasks) < 2


def _environments(now: Study, earlier: Study, together: Study) -> list[Environment]:
    """Returns where both studies were measured, with the parts of each that are left."""
    before, left = earlier.parts(), together.parts()

    def parts(environment: Environment, are_earlier: bool) -> list[str]:
        """Returns those of which something is left; what was taken over is the earlier study's."""
        return [
            part
            for part in environment.parts
            if any((record in before.get(part, ())) == are_earlier for record in left.get(part, ()))
        ]

    then = [dataclasses.replace(of, parts=parts(of, True)) for of in earlier.environments]
    these = [dataclasses.replace(of, parts=parts(of, False)) for of in now.environments]
    return [environment for environment in then + these if environment.parts]
