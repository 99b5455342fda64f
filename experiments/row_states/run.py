"""Measures optimizer states of a table's rows: the cost of each choice in memory and in loss.

AdamW in float32 keeps two numbers beside every value of a table. Other choices keep less: one second moment
per row, moments and table in bfloat16 (rounded stochastically), or another update rule. One model is trained
with each choice on the same batches, over several seeds.

After an interruption the same command resumes the experiment. Without --config, model and training are those
of experiments/configs/row_states.py.

    python launch.py row_states --choices=bfloat16,adagrad --seeds=1
"""

import pathlib

from absl import flags

from experiments.common import report
from experiments.common.seeds import common_environment, train_over_seeds
from experiments.configs import row_states as default_config
from experiments.row_states import tables
from ultramem_jax.cli import command_line
from ultramem_jax.cli.arguments import check_names
from ultramem_jax.data import load_corpus
from ultramem_jax.reporting.environment import describe_environment

BASE_CONFIG = default_config.get_config()

CHOICE_NAMES = flags.DEFINE_list(
    "choices",
    list(tables.CHOICES),
    f"choices to train beside {tables.REFERENCE}, of " + ", ".join(tables.CHOICES),
)
SEEDS = flags.DEFINE_integer("seeds", 3, "number of runs of each choice; seeds are 0, 1, ...", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/row_states", "folder of the runs")
RESULTS = flags.DEFINE_string(
    "results", "experiments/results/row_states", "folder of the table and the figure"
)
KEEP = flags.DEFINE_bool("keep_checkpoints", False, "keep the checkpoints of runs that have ended")


def main() -> None:
    """Trains every choice with every seed, and writes the table and the figure."""
    base = command_line.run_config()
    check_names("choices", CHOICE_NAMES.value, tables.CHOICES)
    configs = tables.make_configs(base, CHOICE_NAMES.value)
    # Described at the start: the code that runs is the code that was checked out at that time.
    environment = describe_environment()
    corpus = load_corpus(base.data)
    results = train_over_seeds(
        configs, SEEDS.value, corpus, WORKDIR.value, environment, keep_checkpoints=KEEP.value
    )
    if results is None:
        return
    folder = pathlib.Path(RESULTS.value)
    table, _ = report.write_table(
        tables.rows(configs, results),
        folder / "row_states",
        "What is kept of a table's rows in training",
        common_environment(results),
        tables.notes(base, corpus, SEEDS.value),
        figures={
            "validation bits per byte more than the reference, against bytes per slot": "row_states.png"
        },
    )
    figure = tables.plot(configs, results, folder / "row_states.png")
    print(f"\n{table.read_text()}\nfigure: {figure}")
