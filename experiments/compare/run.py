"""UltraMem and its baselines at equal compute and equal sparse parameters.

The base is a model with UltraMem memories; `ultramem_jax.baselines.matching` builds the other systems with
the same FLOPs per token and the same sparse parameters, within 2 %. Two more are combinations with an n-gram
table, `ultramem-engram` and `moe-engram`; --table_share says how much of the sparse parameters it has. All
train with the same settings on the same batches, over several seeds. A run that was cut off, or an experiment
that was, goes on with the same command. Without --config, base and training are those of
experiments/configs/compare.py.
"""

import dataclasses
import pathlib

from absl import flags

from experiments.common import figures, report
from experiments.common.seeds import common_environment, train_over_seeds
from experiments.compare import tables as compare_tables
from experiments.configs import compare as compare_config
from ultramem_jax.baselines.matching import COMBINED, SYSTEMS, TABLE_SHARE, match, verify_match
from ultramem_jax.cli import command_line
from ultramem_jax.cli.arguments import check_names
from ultramem_jax.data import load_corpus
from ultramem_jax.reporting.environment import describe_environment

BASE_CONFIG = compare_config.get_config()

ALL_SYSTEMS = (*SYSTEMS, *COMBINED)

SYSTEM_NAMES = flags.DEFINE_list("systems", list(SYSTEMS), "which systems, of " + ", ".join(ALL_SYSTEMS))
SHARE = flags.DEFINE_float(
    "table_share", TABLE_SHARE, "share of the sparse parameters in the n-gram table of combined systems"
)
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each system, seeds 0 to this - 1", lower_bound=1)
TEST_BATCHES = flags.DEFINE_integer("test_batches", 64, "batches of the test split; 0 is all", lower_bound=0)
WORKDIR = flags.DEFINE_string("workdir", "runs/compare", "folder of the runs")
RESULTS = flags.DEFINE_string("results", "experiments/results/compare", "folder of table and figure")


def main() -> None:
    """Trains every system with every seed; writes the table and the figure."""
    base = command_line.run_config()
    check_names("systems", SYSTEM_NAMES.value, ALL_SYSTEMS)
    # Taken now: the code that runs is the one that was checked out when the process started.
    environment = describe_environment()
    models = {system: match(base.model, system, table_share=SHARE.value) for system in SYSTEM_NAMES.value}
    verify_match({"base": base.model, **models})
    corpus = load_corpus(base.data)
    corpus.source("test")  # refuses a split that is too short before anything is trained
    configs = {system: dataclasses.replace(base, model=model) for system, model in models.items()}
    results = train_over_seeds(
        configs, SEEDS.value, corpus, WORKDIR.value, environment, test_batches=TEST_BATCHES.value
    )
    if results is None:
        return
    folder = pathlib.Path(RESULTS.value)
    table, _ = report.write_table(
        [compare_tables.row(system, models[system], runs) for system, runs in results.items()],
        folder / "compare",
        "Systems at equal compute",
        common_environment(results),
        compare_tables.notes(base, corpus, models, SEEDS.value),
    )
    figure = figures.plot_curves(
        {system: [(run["steps"], run["bits"]) for run in runs] for system, runs in results.items()},
        folder / "compare.png",
        title=f"Equal FLOPs per token and sparse parameters, {base.data.dataset}",
        ylabel="validation bits per byte",
    )
    print(f"\n{table.read_text()}\nfigure: {figure}")
