"""Trains a system on new facts: tunes rates, compares methods over seeds, and trains tasks in sequence."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.common.rates import tuned
from experiments.forgetting.evaluation import FactEvaluator
from experiments.forgetting.fine_tuning import BaseModel, fine_tune, run_config
from experiments.forgetting.fingerprints import background_fingerprint, fingerprint
from experiments.forgetting.measurements import Study
from experiments.forgetting.methods import METHODS, SPARSE, Method
from experiments.forgetting.records import FineTuning, TaskSequence, keep, kept
from experiments.forgetting.systems import Setting
from ultramem_jax.config import DataConfig, to_dict
from ultramem_jax.data.facts import Person, Population, biography
from ultramem_jax.errors import require
from ultramem_jax.tree_types import JsonDict

_TUNING = 1_000_000
"""First person of those on whom rates are tuned."""
_COMPARISON = 2_000_000
"""First person of those who are taught with the first seed."""
_SEQUENCE = 3_000_000
"""First person of those who are taught in sequence."""
_OF_SEED = 10_000
"""People between the first ones of two seeds."""
_NEARLY = 0.9
"""Share of what is learned at the best rate that counts as much as that, as measurements are noisy."""


class SystemRuns:
    """Runs fine-tuning of one system. Every run that has ended is kept in a file, and is not repeated."""

    def __init__(
        self,
        model: BaseModel,
        setting: Setting,
        text: DataConfig,
        folder: Path,
        known: Study | None = None,
    ):
        """Prepares the evaluation.

        Args:
            model: the system before it is fine-tuned.
            setting: its tasks.
            text: dataset and path of the text on which forgetting is measured.
            folder: folder of the files.
            known: what was measured before of the system, which is not measured again.
        """
        self._model, self._setting, self._folder = model, setting, folder
        known = known or Study()
        self._known = {"tuning": known.tunings, "comparison": known.runs + known.variants}
        self._known_sequences = known.sequences
        self._evaluator = FactEvaluator(model.config, model.variables, model.tokenizer, text, setting.sizes)
        self._before = list(setting.before.people())
        checks = "check_every", "measure_every", "enough"
        self._identity: JsonDict = {
            "model": fingerprint(model.config, model.variables),
            "background": background_fingerprint(Path(model.background)),
            "people before": setting.before.key,
            "copies": setting.copies,
            "checks": {name: getattr(setting.task, name) for name in checks},
            "sizes": dataclasses.asdict(setting.sizes),
        }

    @property
    def methods(self) -> list[Method]:
        """Returns the methods that are compared."""
        return [method for method in METHODS if method.name in self._setting.rates]

    def tune(self, method: Method) -> list[FineTuning]:
        """Returns a run for each rate of a method, on people whom no other part teaches.

        Further rates are tried while the best one is the lowest or the highest, see `rates.tuned`.
        """

        def measure(rate: float) -> list[FineTuning]:
            return [self._fine_tuned(method, rate, _TUNING, 0, "tuning")]

        return tuned(self._setting.rates[method.name], measure, best_rate)

    def compare(self, method: Method, seeds: int) -> list[FineTuning]:
        """Returns a run for each seed, at the best rate of a method; each seed has people of its own."""
        return self._over_seeds(method, best_rate(self.tune(method)), seeds)

    def vary(self, method: Method, seeds: int) -> list[FineTuning]:
        """Returns what `compare` returns, at the best rate of `SPARSE`."""
        return self._over_seeds(method, best_rate(self.tune(SPARSE)), seeds)

    def in_sequence(self, method: Method, tasks: int, seed: int) -> TaskSequence:
        """Returns what is left of each task after the later ones, at the best rate of a method."""
        rate, new = best_rate(self.tune(method)), self._setting.new_in_sequence
        for of in self._known_sequences:
            if (of.method, of.rate, of.seed, of.tasks) == (method.name, rate, seed, tasks):
                return of
        path = self._path("sequence", method, f"{rate:g}_{tasks}_tasks_seed_{seed}")
        first = _SEQUENCE + seed * _OF_SEED
        identity = self._identity_of(method, rate, seed, Population(first, first + tasks * new))
        if path.exists():
            return kept(path, identity, TaskSequence.of)
        model, groups = self._model, []
        sequence = TaskSequence(model.system, method.name, rate, seed, tasks, [], [], [])
        for number in range(tasks):
            people = list(Population(first + number * new, first + (number + 1) * new).people())
            groups.append(people)
            task = replace(self._setting.task, texts=self._texts(people))
            evaluation = self._evaluator.of_task(people, self._before)
            record, variables = fine_tune(model, method, rate, task, evaluation, seed)
            if record.diverged:
                break
            model = dataclasses.replace(model, variables=variables)
            sequence.left.append([self._evaluator.greedy(variables, group) for group in groups])
            sequence.kept.append(record.points[-1].kept)
            sequence.bits_per_byte.append(record.points[-1].bits_per_byte)
        keep(sequence, path, identity)
        return sequence

    def _over_seeds(self, method: Method, rate: float, seeds: int) -> list[FineTuning]:
        return [
            self._fine_tuned(method, rate, _COMPARISON + seed * _OF_SEED, seed, "comparison")
            for seed in range(seeds)
        ]

    def _fine_tuned(self, method: Method, rate: float, first: int, seed: int, part: str) -> FineTuning:
        for run in self._known[part]:
            if (run.method, run.rate, run.seed) == (method.name, rate, seed):
                return run
        path = self._path(part, method, f"{rate:g}_seed_{seed}")
        new = Population(first, first + self._setting.new)
        identity = self._identity_of(method, rate, seed, new)
        if path.exists():
            return kept(path, identity, FineTuning.of)
        people = list(new.people())
        task = replace(self._setting.task, texts=self._texts(people))
        record, _ = fine_tune(
            self._model, method, rate, task, self._evaluator.of_task(people, self._before), seed
        )
        keep(record, path, identity)
        return record

    def _identity_of(self, method: Method, rate: float, seed: int, new: Population) -> JsonDict:
        """Returns all that decides a record."""
        config = run_config(self._model, method, rate, self._setting.task, seed)
        # The file of the background counts by what it holds, as folders may be moved.
        name = Path(config.train.background).name
        config = replace(config, train=replace(config.train, background=name))
        return {**self._identity, "run": to_dict(config), "people": new.key}

    def _path(self, part: str, method: Method, name: str) -> Path:
        words = (re.sub(r"\W+", "_", of).strip("_").lower() for of in (self._model.system, method.name))
        return self._folder.joinpath(part, *words, f"{name}.json")

    def _texts(self, people: Sequence[Person]) -> list[str]:
        return [biography(of, which) for which in range(self._setting.copies) for of in people]


def best_rate(runs: Sequence[FineTuning]) -> float:
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

    def order(run: FineTuning) -> tuple[bool, float, float]:
        point = run.at(common)
        last = point or run.points[-1]
        return point is None, -last.kept, last.bits_per_byte

    return min(whole, key=order).rate
