"""Measures how many facts a model of given compute holds, against its sparse parameters.

Biographies of made-up people (`ultramem_jax.data.facts`) are all that the models learn. So what a model holds
can be counted in bits (Allen-Zhu and Li, arXiv 2404.05405). Dense, MoE, PKM, UltraMem, UltraMemV2 and Engram
have the same FLOPs per token (`ultramem_jax.baselines.matching`), and sparse parameters from 2 to 32 times
those of the dense model.

Each system has the best of a few learning rates, tuned at one size with a seed of its own. The model of
--config is the UltraMem whose compute all have; its slots are replaced by those of --sizes. After an
interruption the same command resumes the experiment. Without --config, model, people and training are those
of experiments/configs/recall.py.

    python launch.py recall --systems=dense,ultramem --sizes=2,8 --seeds=1
"""

import math
import pathlib

from absl import flags

from experiments.configs import recall as recall_config
from experiments.recall import tables
from experiments.recall.records import Run, Study
from experiments.recall.systems import SYSTEMS, Variant, variant
from experiments.recall.trials import Trials, best_rate, population_of
from ultramem_jax import RunConfig
from ultramem_jax.cli import command_line
from ultramem_jax.cli.arguments import check_names, positive_number
from ultramem_jax.data import Corpus, load_corpus
from ultramem_jax.errors import require
from ultramem_jax.reporting.environment import describe_environment

BASE_CONFIG = recall_config.get_config()

SYSTEM_NAMES = flags.DEFINE_list("systems", list(SYSTEMS), "systems to train, of " + ", ".join(SYSTEMS))
SIZES = flags.DEFINE_list(
    "sizes", ["2", "8", "32"], "sparse parameters, in multiples of the dense model's parameters"
)
RATES = flags.DEFINE_list(
    "rates",
    ["0.004", "0.008", "0.016"],
    "learning rates to try first; further ones follow where the best is at an end",
)
TUNED_SIZE = flags.DEFINE_integer("tuned_size", 8, "size at which the rates are tuned", lower_bound=1)
SEEDS = flags.DEFINE_integer(
    "seeds", 3, "runs of each system and size; seeds are 0, 1, ...", lower_bound=1, upper_bound=100
)
WORKDIR = flags.DEFINE_string("workdir", "runs/recall", "folder of the runs")
RESULTS = flags.DEFINE_string("results", "experiments/results/recall", "folder of the table and the figure")
REDRAW = flags.DEFINE_bool(
    "redraw", False, "train nothing; only make table and figure from the .json file in --results"
)


def main() -> None:
    """Tunes and trains every system, and writes the table and the figure after every seed."""
    results = pathlib.Path(RESULTS.value)
    if REDRAW.value:
        kept = results / f"{tables.NAME}.json"
        require(kept.exists(), "results", RESULTS.value, f"must hold the {kept.name} of an earlier run")
        _write(Study.load(kept), results)
        return
    base = command_line.run_config()
    population = population_of(base.data)
    check_names("systems", SYSTEM_NAMES.value, SYSTEMS)
    sizes = sorted({positive_number("sizes", text) for text in SIZES.value})
    require(bool(sizes), "sizes", "", "must name at least one")
    rates = sorted({_rate(text) for text in RATES.value})
    require(bool(rates), "rates", "", "must name at least one")
    # Described at the start: the code that runs is the code that was checked out at that time.
    environment = describe_environment()
    tuned = [variant(base.model, system, TUNED_SIZE.value) for system in SYSTEM_NAMES.value]
    variants = _variants(base, sizes)
    corpus = load_corpus(base.data)
    trials = Trials(base, population, corpus, pathlib.Path(WORKDIR.value))
    tunings = {one.system: trials.tune(one, rates) for one in tuned}
    chosen = {system: best_rate(runs) for system, runs in tunings.items()}
    runs: list[Run] = []
    diverged: list[str] = []
    # All variants of a seed come before the next seed, so that an interrupted experiment has every variant.
    for seed in range(SEEDS.value):
        for one in variants:
            if (run := trials.run(one, chosen[one.system], seed)) is not None:
                runs.append(run)
            else:
                diverged.append(f"{one.name}, seed {seed}")
        tuning_runs = [run for of_system in tunings.values() for run in of_system]
        training = _training_in_words(base, corpus, trials)
        study = Study(environment, training, trials.people, trials.all_bits, tuning_runs, runs, diverged)
        _write(study, results)


def _variants(base: RunConfig, sizes: list[int]) -> list[Variant]:
    """Returns all systems of all sizes, each variant once: the dense model has one size."""
    found = (variant(base.model, system, size) for system in SYSTEM_NAMES.value for size in sizes)
    return list({one.name: one for one in found}.values())


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    require(0 < rate < math.inf, "rates", text, "must be numbers above 0")
    return rate


def _training_in_words(base: RunConfig, corpus: Corpus, trials: Trials) -> str:
    """Describes the training that all runs share."""
    train, data, model = base.train, base.data, base.model
    return (
        f"{train.steps:,} steps of {train.batch_size} × {data.seq_len} tokens, in which each person comes "
        f"{trials.exposures:.0f} times; corpus {data.dataset}, {corpus.num_tokens['train'] / 1e6:.2f} M "
        f"tokens of training, vocabulary {corpus.tokenizer.vocab_size:,}, hash {corpus.corpus_hash[:12]}. "
        f"Width {model.embed_dim}, {model.num_layers} layers."
    )


def _write(study: Study, results: pathlib.Path) -> None:
    written = tables.write(study, results)
    print(f"\n{written[0].read_text(encoding='utf-8')}\nwritten: {', '.join(map(str, written))}")
