"""Runs the lessons of a system: tunes the rate of each method, teaches over seeds, and in sequence."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.forgetting.examination import Examiner
from experiments.forgetting.methods import SPARSE, Method
from experiments.forgetting.records import Sequel, Teaching, keep, kept
from experiments.forgetting.systems import Curriculum
from experiments.forgetting.teaching import Pupil, teach
from ultramem_jax.config import DataConfig, to_dict
from ultramem_jax.data.facts import Person, Population, biography
from ultramem_jax.errors import require
from ultramem_jax.nested import leaves
from ultramem_jax.tree_types import JsonDict

_TUNING = 1_000_000
"""First person of those on whom rates are tuned."""
_TEACHING = 2_000_000
"""First person of those who are taught with the first seed."""
_SEQUENCE = 3_000_000
"""First person of those who are taught in sequence."""
_OF_SEED = 10_000
"""People between the first ones of two seeds."""
_NEARLY = 0.9
"""Share of what is learned at the best rate that counts as much as that, as measurements are noisy."""


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
        self._identity: JsonDict = {
            "model": _fingerprint(pupil),
            "people before": curriculum.before.key,
            "copies": curriculum.copies,
            "lesson": {name: of for name, of in vars(curriculum.lesson).items() if name != "texts"},
            "sizes": dataclasses.asdict(curriculum.sizes),
        }

    def tune(self, method: Method) -> list[Teaching]:
        """Returns a run for each rate of a method, on people whom no other part teaches."""
        rates = self._curriculum.rates[method.name]
        return [self._taught(method, rate, _TUNING, 0, "tuning") for rate in rates]

    def teach(self, method: Method, seeds: int) -> list[Teaching]:
        """Returns a run for each seed, at the best rate of a method; each seed has people of its own."""
        return self._over_seeds(method, best_rate(self.tune(method)), seeds)

    def vary(self, method: Method, seeds: int) -> list[Teaching]:
        """Returns what `teach` returns, at the best rate of `SPARSE`."""
        return self._over_seeds(method, best_rate(self.tune(SPARSE)), seeds)

    def teach_in_sequence(self, method: Method, lessons: int, seed: int) -> Sequel:
        """Returns what is left of each lesson after the later ones, at the best rate of a method."""
        rate, new = best_rate(self.tune(method)), self._curriculum.new_in_sequence
        path = self._path("sequence", method, f"{rate:g}_{lessons}_lessons_seed_{seed}")
        identity = self._identity_of(method, new)
        if path.exists():
            return Sequel(**kept(path, identity))
        pupil, groups = self._pupil, []
        sequel = Sequel(pupil.system, method.name, rate, seed, [], [], [])
        for number in range(lessons):
            people = self._people(_SEQUENCE + seed * _OF_SEED + number * new, new)
            groups.append(people)
            lesson = replace(self._curriculum.lesson, texts=self._texts(people))
            exam = self._examiner.exam(people, self._before)
            record, variables = teach(pupil, method, rate, lesson, exam, seed)
            if record.diverged:
                break
            pupil = dataclasses.replace(pupil, variables=variables)
            sequel.left.append([self._examiner.greedy(variables, group) for group in groups])
            sequel.kept.append(record.points[-1].kept)
            sequel.bits_per_byte.append(record.points[-1].bits_per_byte)
        keep(sequel, path, identity)
        return sequel

    def _over_seeds(self, method: Method, rate: float, seeds: int) -> list[Teaching]:
        firsts = [_TEACHING + seed * _OF_SEED for seed in range(seeds)]
        return [self._taught(method, rate, first, seed, "teaching") for seed, first in enumerate(firsts)]

    def _taught(self, method: Method, rate: float, first: int, seed: int, part: str) -> Teaching:
        path = self._path(part, method, f"{rate:g}_seed_{seed}")
        identity = self._identity_of(method, self._curriculum.new)
        if path.exists():
            return Teaching.of(kept(path, identity))
        people = self._people(first, self._curriculum.new)
        lesson = replace(self._curriculum.lesson, texts=self._texts(people))
        record, _ = teach(self._pupil, method, rate, lesson, self._examiner.exam(people, self._before), seed)
        keep(record, path, identity)
        return record

    def _identity_of(self, method: Method, new: int) -> JsonDict:
        """Returns what decides a record, besides what stands in its path."""
        return {**self._identity, "method": dataclasses.asdict(method), "new people": new}

    def _path(self, part: str, method: Method, name: str) -> Path:
        words = (re.sub(r"\W+", "_", of).strip("_").lower() for of in (self._pupil.system, method.name))
        return self._folder.joinpath(part, *words, f"{name}.json")

    def _people(self, first: int, number: int) -> list[Person]:
        return list(Population(first, first + number).people())

    def _texts(self, people: Sequence[Person]) -> list[str]:
        return [biography(of, which) for which in range(self._curriculum.copies) for of in people]


def best_rate(runs: Sequence[Teaching]) -> float:
    """Returns the rate that forgets least until enough is learned.

    Where no rate gets so far, it is the one that forgets least until about as much is learned as by the best.

    Raises:
        UserError: all runs have diverged.
    """
    whole = [run for run in runs if not run.diverged]
    rates = ", ".join(f"{run.rate:g}" for run in runs)
    require(bool(whole), f"rates of {runs[0].method}", rates, "must have one that is low enough")
    most = max(point.learned for run in whole for point in run.points)
    common = min(runs[0].enough, _NEARLY * most)

    def order(run: Teaching) -> tuple[bool, float, float]:
        point = run.at(common)
        last = point or run.points[-1]
        return point is None, -last.kept, last.bits_per_byte

    return min(whole, key=order).rate


def at_an_end(runs: Sequence[Teaching]) -> bool:
    """Tells whether the best of several rates is the lowest or the highest."""
    rates = sorted({run.rate for run in runs})
    return len(rates) > 1 and best_rate(runs) in (rates[0], rates[-1])


def _fingerprint(pupil: Pupil) -> str:
    """Returns a hash of a model's config and of all its arrays."""
    digest = hashlib.sha256(repr(to_dict(pupil.config)).encode())
    for path, array in leaves(pupil.variables):
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()
