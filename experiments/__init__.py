"""Lists the experiments: programs driven by absl flags, run by `python launch.py <experiment> [flags]`."""

from ultramem_jax.cli.launcher import Command

EXPERIMENTS = {
    "compare": Command(
        "experiments.compare.run",
        "UltraMem and its baselines at equal compute and equal sparse parameters",
        in_several_processes=True,
    ),
    "ablate": Command(
        "experiments.ablate.run",
        "the ladder from PKM to UltraMem, one change at a time, and the grids of E, r and h",
        in_several_processes=True,
    ),
    "row_states": Command(
        "experiments.row_states.run",
        "optimizer states of a table's rows: their cost in host memory and in loss",
        in_several_processes=True,
    ),
    "bench_step": Command(
        "experiments.bench_step.run",
        "time of a training step against the slots of a memory, with its floor and its parts",
    ),
    "bench_train": Command(
        "experiments.bench_train.run",
        "time of a model's training step beside its baselines at equal compute",
    ),
    "bench_decode": Command(
        "experiments.bench_decode.run",
        "time of a decoding step against batch and slots, beside dense, MoE and PKM",
    ),
    "bench_owner": Command(
        "experiments.bench_owner.run", "time of the work of one of P owners of a table in a lookup"
    ),
    "large_table": Command(
        "experiments.large_table.run",
        "a training with a table of many gigabytes, stopped and resumed, and its host memory",
    ),
    "forgetting": Command(
        "experiments.forgetting.run",
        "new facts, taught by sparse memory fine-tuning and three other ways, and what is forgotten",
    ),
    "recall": Command(
        "experiments.recall.run",
        "facts that a model of given compute holds, against its sparse parameters",
    ),
    "open_models": Command(
        "experiments.open_models.run",
        "a real open model: bits per byte, continuations, and speed beside other programs",
    ),
}
"""Experiments by their names on the command line, in the order in which they are listed."""
