"""What is kept of a table's rows in training, and what each choice costs in memory and in loss.

AdamW in float32 keeps two numbers beside every number of a table. The second moment can be one per row,
moments and table can be bfloat16, rounded stochastically, and other rules keep less. One model is trained
with each choice on the same batches, over several seeds. An experiment that was cut off goes on with the same
command. Without --config, model and training are those of experiments/configs/row_states.py.
"""

import pathlib

from absl import flags

from experiments.common import report
from experiments.common.seeds import common_environment, train_over_seeds
from experiments.configs import row_states as default_config
from experiments.row_states import tables as row_states_table
from ultramem_jax.cli import command_line
from ultramem_jax.cli.arguments import check_names
from ultramem_jax.data import load_corpus
from ultramem_jax.reporting.environment import describe_environment

BASE_CONFIG = default_config.get_config()

CHOICE_NAMES = flags.DEFINE_list(
    "choices",
    list(row_states_table.CHOICES),
    f"what to train beside {row_states_table.REFERENCE}, of " + ", ".join(row_states_table.CHOICES),
)
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each choice, seeds 0 to this - 1", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/row_states", "folder of the runs")
RESULTS = flags.DEFINE_string("results", "experiments/results/row_states", "folder of table and figure")
KEEP = flags.DEFINE_bool("keep_checkpoints", False, "keep the checkpoints of runs that have ended")


def main() -> None:
    """Trains every choice with every seed; writes the table and the figure."""
    base = command_line.run_config()
    check_names("choices", CHOICE_NAMES.value, row_states_table.CHOICES)
    configs = row_states_table.make_configs(base, CHOICE_NAMES.value)
    # Taken now: the code that runs is the one that was checked out when the process started.
    environment = describe_environment()
    corpus = load_corpus(base.data)
    results = train_over_seeds(
        configs, SEEDS.value, corpus, WORKDIR.value, environment, keep_checkpoints=KEEP.value
    )
    if results is None:
        return
    folder = pathlib.Path(RESULTS.value)
    table, _ = report.write_table(
        row_states_table.rows(configs, results),
        folder / "row_states",
        "What is kept of a table's rows in training",
        common_environment(results),
        row_states_table.notes(base, corpus, SEEDS.value),
    )
    figure = row_states_table.plot(configs, results, folder / "row_states.png")
    print(f"\n{table.read_text()}\nfigure: {figure}")
