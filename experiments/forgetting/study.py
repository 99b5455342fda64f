"""Runs the lessons of a system: tunes the rate of each method, teaches over seeds, and in sequence."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.forgetting.examination import Examiner
from experiments.forgetting.methods import SPARSE, Method
from experiments.forgetting.records import Sequel, Teaching
from experiments.forgetting.systems import Curriculum
from experiments.forgetting.teaching import Pupil, teach
from ultramem_jax.config import DataConfig
from ultramem_jax.data.facts import Person, Population, biography

_TUNING = 1_000_000
"""First person of those on whom rates are tuned."""
_TEACHING = 2_000_000
"""First person of those who are taught with the first seed."""
_SEQUENCE = 3_000_000
"""First person of those who are taught in sequence."""
_OF_SEED = 10_000
"""People between the first ones of two seeds."""


class Classroom:
    """Teaches one system. Every run that has ended is kept in a file, and is not repeated."""

    def __init__(self, pupil: Pupil, curriculum: Curriculum, text: DataConfig, folder: Path):
        """Prepares to teach.

        Args:
            pupil: the system.
            curriculum: its lessons.
            text: dataset and path of the text on which forgetting is measured.
            folder: folder of the files.
        """
        self._pupil, self._curriculum, self._folder = pupil, curriculum, folder
        self._examiner = Examiner(pupil.config, pupil.variables, pupil.tokenizer, text, curriculum.sizes)
        self._before = list(curriculum.before.people())

    def tune(self, method: Method) -> list[Teaching]:
        """Returns a run for each rate of a method, on people whom no other part teaches."""
        rates = self._curriculum.rates[method.name]
        return [self._taught(method, rate, _TUNING, 0, "tuning") for rate in rates]

    def teach(self, method: Method, seeds: int) -> list[Teaching]:
        """Returns a run for each seed, at the best rate of a method; each seed has people of its own."""
        rate = best_rate(self.tune(method), self._curriculum.lesson.enough)
        return self._over_seeds(method, rate, seeds)

    def vary(self, method: Method, seeds: int) -> list[Teaching]:
        """Returns what `teach` returns, at the best rate of `SPARSE`."""
        rate = best_rate(self.tune(SPARSE), self._curriculum.lesson.enough)
        return self._over_seeds(method, rate, seeds)

    def teach_in_sequence(self, method: Method, lessons: int, seed: int) -> Sequel:
        """Returns what is left of each lesson after the later ones, at the best rate of a method."""
        path = self._path("sequence", method, f"seed_{seed}")
        if path.exists():
            return Sequel.load(path)
        rate = best_rate(self.tune(method), self._curriculum.lesson.enough)
        pupil, groups = self._pupil, []
        sequel = Sequel(pupil.system, method.name, rate, seed, [], [], [])
        for number in range(lessons):
            first = _SEQUENCE + seed * _OF_SEED + number * self._curriculum.new_in_sequence
            people = self._people(first, self._curriculum.new_in_sequence)
            groups.append(people)
            lesson = replace(self._curriculum.lesson, texts=self._texts(people))
            exam = self._examiner.exam(people, self._before)
            record, variables = teach(pupil, method, rate, lesson, exam, seed)
            pupil = dataclasses.replace(pupil, variables=variables)
            sequel.left.append([self._examiner.greedy(variables, group) for group in groups])
            sequel.kept.append(record.points[-1].kept)
            sequel.bits_per_byte.append(record.points[-1].bits_per_byte)
        sequel.save(path)
        return sequel

    def _over_seeds(self, method: Method, rate: float, seeds: int) -> list[Teaching]:
        firsts = [_TEACHING + seed * _OF_SEED for seed in range(seeds)]
        return [self._taught(method, rate, first, seed, "teaching") for seed, first in enumerate(firsts)]

    def _taught(self, method: Method, rate: float, first: int, seed: int, part: str) -> Teaching:
        path = self._path(part, method, f"{rate:g}_seed_{seed}")
        if path.exists():
            return Teaching.load(path)
        people = self._people(first, self._curriculum.new)
        lesson = replace(self._curriculum.lesson, texts=self._texts(people))
        record, _ = teach(self._pupil, method, rate, lesson, self._examiner.exam(people, self._before), seed)
        record.save(path)
        return record

    def _path(self, part: str, method: Method, name: str) -> Path:
        words = (re.sub(r"\W+", "_", of).strip("_").lower() for of in (self._pupil.system, method.name))
        return self._folder.joinpath(part, *words, f"{name}.json")

    def _people(self, first: int, number: int) -> list[Person]:
        return list(Population(first, first + number).people())

    def _texts(self, people: Sequence[Person]) -> list[str]:
        return [biography(of, which) for which in range(self._curriculum.copies) for of in people]


def best_rate(runs: Sequence[Teaching], enough: float) -> float:
    """Returns the rate whose run forgets least of those that learn enough; else that which learns most."""

    def order(run: Teaching) -> tuple[float, float, float]:
        last = run.points[-1]
        if not math.isfinite(last.bits_per_byte):
            return math.inf, 0.0, 0.0
        return max(0.0, enough - last.learned), -last.kept, last.bits_per_byte

    return min(runs, key=order).rate
