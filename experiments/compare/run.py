"""Compares UltraMem with its baselines at equal compute and equal sparse parameters.

The base is a model with UltraMem memories. `ultramem_jax.baselines.matching` builds the other systems with
the same FLOPs per token and the same sparse parameters, within 2 %. Two more systems combine a model with an
n-gram table: `ultramem-engram` and `moe-engram`; --table_share sets the share of their sparse parameters that
is in the table.

All systems train with the same settings on the same batches, over several seeds. After an interruption the
same command resumes the experiment. Without --config, base and training are those of
experiments/configs/compare.py.

    python launch.py compare --systems=ultramem,dense,moe --seeds=1
"""

import dataclasses
import pathlib

from absl import flags

from experiments.common import figures, report
from experiments.common.seeds import common_environment, train_over_seeds
from experiments.compare import tables
from experiments.configs import compare as compare_config
from ultramem_jax.baselines.matching import COMBINED, SYSTEMS, TABLE_SHARE, match, verify_match
from ultramem_jax.cli import command_line
from ultramem_jax.cli.arguments import check_names
from ultramem_jax.data import load_corpus
from ultramem_jax.reporting.environment import describe_environment

BASE_CONFIG = compare_config.get_config()

ALL_SYSTEMS = (*SYSTEMS, *COMBINED)

SYSTEM_NAMES = flags.DEFINE_list("systems", list(SYSTEMS), "systems to train, of " + ", ".join(ALL_SYSTEMS))
SHARE = flags.DEFINE_float(
    "table_share",
    TABLE_SHARE,
    "share of the sparse parameters of combined systems that is in their n-gram table",
)
SEEDS = flags.DEFINE_integer("seeds", 3, "number of runs of each system; seeds are 0, 1, ...", lower_bound=1)
TEST_BATCHES = flags.DEFINE_integer(
    "test_batches", 64, "batches of the test split to evaluate; 0: all", lower_bound=0
)
WORKDIR = flags.DEFINE_string("workdir", "runs/compare", "folder of the runs")
RESULTS = flags.DEFINE_string("results", "experiments/results/compare", "folder of the table and the figure")


def main() -> None:
    """Trains every system with every seed, and writes the table and the figure."""
    base = command_line.run_config()
    check_names("systems", SYSTEM_NAMES.value, ALL_SYSTEMS)
    # Described at the start: the code that runs is the code that was checked out at that time.
    environment = describe_environment()
    models = {system: match(base.model, system, table_share=SHARE.value) for system in SYSTEM_NAMES.value}
    verify_match({"base": base.model, **models})
    corpus = load_corpus(base.data)
    corpus.source("test")  # raises for a split that is too short, before anything is trained
    configs = {system: dataclasses.replace(base, model=model) for system, model in models.items()}
    results = train_over_seeds(
        configs, SEEDS.value, corpus, WORKDIR.value, environment, test_batches=TEST_BATCHES.value
    )
    if results is None:
        return
    folder = pathlib.Path(RESULTS.value)
    table, _ = report.write_table(
        [tables.row(system, models[system], runs) for system, runs in results.items()],
        folder / "compare",
        "Systems at equal compute",
        common_environment(results),
        tables.notes(base, corpus, models, SEEDS.value),
        figures={"validation bits per byte over training, by system": "compare.png"},
    )
    figure = figures.plot_curves(
        {system: [(run["steps"], run["bits"]) for run in runs] for system, runs in results.items()},
        folder / "compare.png",
        title=f"Equal FLOPs per token and sparse parameters, {base.data.dataset}",
        ylabel="validation bits per byte",
    )
    print(f"\n{table.read_text()}\nfigure: {figure}")
