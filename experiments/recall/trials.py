"""Trains the variants and asks them for what they were taught; a run that has ended is not repeated."""

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.common.rates import tuned
from experiments.common.seeds import remember_compilations
from experiments.common.whole_runs import train_whole
from experiments.recall.records import Answers, Run
from experiments.recall.systems import Variant, shape
from ultramem_jax import RunConfig, UserError
from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.config import DataConfig, run_config_from_dict, to_dict
from ultramem_jax.data import Corpus
from ultramem_jax.data.fact_words import ATTRIBUTES
from ultramem_jax.data.facts import Population, Query, queries
from ultramem_jax.errors import LossNotFinite, require
from ultramem_jax.files import replace_text
from ultramem_jax.models.fact_recall import pair_ids, recall
from ultramem_jax.models.scoring import Scorer
from ultramem_jax.reporting.records import kept_record
from ultramem_jax.training.loop import TrainResult
from ultramem_jax.training.restore import load_model

TUNING_SEEDS = (100, 101)
"""Seeds of the runs by which rates are chosen; no other runs have them."""

_SCORED_TOGETHER = 64
"""Queries that are scored together."""


class Trials:
    """Trains models on one population. Each run has a folder of its own, which keeps its result."""

    def __init__(self, base: RunConfig, population: Population, corpus: Corpus, folder: Path):
        """Prepares the queries.

        Args:
            base: data and training of all runs; model, learning rate and seed are replaced.
            population: the people of `base.data`.
            corpus: their corpus.
            folder: folder of the runs, in which compiled programs are kept, too.

        Raises:
            UserError: sequences that are shorter than a query.
        """
        self._base, self._corpus, self._folder = base, corpus, folder
        self._population = population
        people = list(population.people())
        asked = {
            "statements": list(queries(people, "statement", max_choices=1)),
            "held_out": list(queries(people, "held_out_statement", max_choices=1)),
            "questions": list(queries((of for of in people if not of.quizzed), "question", max_choices=1)),
        }
        self._asked: dict[str, list[Query]] = asked
        longest = max(map(self._length, (query for form in asked.values() for query in form)))
        allowed = f"must be at least {longest}, the tokens of the longest query with its answer"
        require(base.data.seq_len >= longest, "data.seq_len", base.data.seq_len, allowed)
        # The program of a variant is the same for every seed, and after an interruption.
        remember_compilations(folder / "compiled")

    @property
    def people(self) -> int:
        """Returns the number of people."""
        return self._population.end - self._population.first

    @property
    def all_bits(self) -> float:
        """Returns the bits of all values of all people."""
        return self.people * math.fsum(math.log2(len(of.values)) for of in ATTRIBUTES.values())

    @property
    def exposures(self) -> float:
        """Returns how often each person comes in training, on average; questions are not counted."""
        train = self._base.train
        epochs = train.steps * train.batch_size * self._base.data.seq_len / self._corpus.num_tokens["train"]
        return epochs * self._population.copies

    def run(self, variant: Variant, rate: float, seed: int) -> Run | None:
        """Returns the result of one run, which is trained now unless that was done before.

        It is None if the loss did not stay finite. That says something about the system, and must not end
        the experiment.

        Raises:
            UserError: the folder of the run holds one of another config, corpus or tokenizer.
            Stopped: SIGTERM came.
        """
        train_config = replace(self._base.train, learning_rate=rate, seed=seed)
        config = replace(self._base, model=variant.model, train=train_config)
        folder = self._folder / f"{variant.name}-{rate:g}-seed{seed}"
        print(f"{variant.name}, learning rate {rate:g}, seed {seed}: {folder}", flush=True)
        done = folder / "result.json"
        if done.exists():
            return self._kept(done, config)
        try:
            trained = train_whole(config, folder, corpus=self._corpus)
            run = self._examined(variant, config, folder, trained)
        except LossNotFinite as error:
            print(f"{folder}: {error}", flush=True)
            run = None
        result = dataclasses.asdict(run) if run is not None else None
        replace_text(done, json.dumps({**self._identity(config), "run": result}))
        # Checkpoints of a hundred runs would fill gigabytes.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return run

    def tune(self, variant: Variant, rates: Iterable[float]) -> list[Run]:
        """Returns the runs of a variant at each learning rate at which its loss stays finite.

        Further rates are tried while the best one is the lowest or the highest, see `rates.tuned`.

        Raises:
            UserError: as `run`, or no rate is low enough.
            Stopped: SIGTERM came.
        """
        rates = tuple(rates)

        def measure(rate: float) -> list[Run]:
            found = [self.run(variant, rate, seed) for seed in TUNING_SEEDS]
            return [] if None in found else [run for run in found if run is not None]

        def best(runs: Sequence[Run]) -> float:
            require(bool(runs), "rates", rates, f"must have one that is low enough for {variant.name}")
            return best_rate(runs)

        return tuned(rates, measure, best)

    def _length(self, query: Query) -> int:
        return sum(map(len, pair_ids(self._corpus.tokenizer, query.prompt, query.answer)))

    def _identity(self, config: RunConfig) -> dict[str, object]:
        return {
            "config": to_dict(config),
            "corpus_hash": self._corpus.corpus_hash,
            "tokenizer_hash": self._corpus.tokenizer.fingerprint,
        }

    def _kept(self, done: Path, config: RunConfig) -> Run | None:
        """Returns a result that is kept. Fields that its config did not have yet get their defaults."""
        now = self._identity(config)
        with kept_record(done, "the result of a run") as kept:
            then = {name: kept[name] for name in now}
            then["config"] = to_dict(run_config_from_dict(then["config"]))
            run = Run.of(kept["run"]) if kept["run"] is not None else None
        if then != now:
            raise UserError(
                f"{done.parent} holds a run of another config, corpus or tokenizer; give another --workdir"
            )
        return run

    def _examined(self, variant: Variant, config: RunConfig, folder: Path, trained: TrainResult) -> Run:
        loaded = load_model(folder)
        model, tokenizer = loaded.config.model, self._corpus.tokenizer
        scorer = Scorer(model, loaded.variables, max_length=config.data.seq_len, batch_size=_SCORED_TOGETHER)
        answers = {form: Answers.of(recall(scorer, tokenizer, asked)) for form, asked in self._asked.items()}
        parameters = count_parameters(variant.model)
        speed, bits = trained.tokens_per_second, trained.validation_bits_per_byte
        return Run(
            system=variant.system,
            size=variant.size,
            shape=shape(variant.model),
            rate=config.train.learning_rate,
            seed=config.train.seed,
            dense_parameters=parameters.dense,
            sparse_parameters=parameters.sparse,
            flops=flops_per_token(variant.model).matched,
            validation_bits=bits if math.isfinite(bits) else None,
            tokens_per_second=speed if math.isfinite(speed) else None,
            **answers,
        )


def population_of(data: DataConfig) -> Population:
    """Returns the people of a dataset.

    Raises:
        UserError: a dataset that is not of people.
    """
    kind, _, spec = data.dataset.partition(":")
    require(kind == "facts", "data.dataset", data.dataset, "must be facts:FIRST-END[xCOPIES][@SEED]")
    return Population.parse(spec)


def best_rate(runs: Sequence[Run]) -> float:
    """Returns the rate whose runs hold most bits on average; of equal ones, whose answers are likeliest."""

    def order(rate: float) -> tuple[float, float]:
        answers = [run.statements for run in runs if run.rate == rate]
        bits, nats = ([getattr(of, name) for of in answers] for name in ("stored_bits", "nats"))
        return -statistics.fmean(bits), statistics.fmean(nats)

    return min({run.rate for run in runs}, key=order)
