"""What each change of UltraMem brings: the ladder of its paper's table 2, and the grids of table 3.

Twelve models lead from Product-Key Memory to UltraMem, each the one before it with one change; the grids vary
E, r and h, and try a change alone. All train on the same batches, over several seeds, and stand beside the
published differences. An experiment that was cut off goes on with the same command. Without --config the
training is that of experiments/configs/ablate.py, for the tiny models; the paper's sizes need another.
"""

import dataclasses
import pathlib

from absl import flags

from experiments.ablate import tables
from experiments.common.seeds import train_over_seeds
from experiments.configs import ablate as tiny_config
from ultramem_jax import ModelConfig, UserError
from ultramem_jax.cli import command_line
from ultramem_jax.data import load_corpus
from ultramem_jax.presets import ladder
from ultramem_jax.reporting.environment import describe_environment

BASE_CONFIG = tiny_config.get_config()
CONFIG_HELP = (
    "--config=FILE: a Python file with get_config() -> RunConfig; it is run as a program, so take one "
    "that you trust; --scale=151m needs one",
    "--config.data.field=value, --config.train.field=value: any of the fields below, explained in "
    "ultramem_jax/config.py",
    "--config.model.dtype=value: all that can be set of the models, which are those of --scale",
)

SCALE = flags.DEFINE_enum("scale", "tiny", list(ladder.SCALES), "sizes of the models: tiny, or the paper's")
PART_NAMES = flags.DEFINE_list("parts", list(tables.PARTS), "what to train, of " + ", ".join(tables.PARTS))
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each config, seeds 0 to this - 1", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "", "folder of the runs; empty: runs/ablate, or runs/ablate-151m")
RESULTS = flags.DEFINE_string(
    "results", "", "folder of tables and figures; empty: experiments/results/ablate, or ablate-151m"
)
KEEP = flags.DEFINE_bool("keep_checkpoints", False, "keep the checkpoints of runs that have ended")


def main() -> None:
    """Trains every config with every seed; writes the tables and the figures."""
    base = command_line.run_config()
    if dataclasses.replace(base.model, dtype="float32") != ModelConfig():
        raise UserError("config.model: the models are those of --scale; dtype is all that can be set here")
    if SCALE.value != "tiny" and _trains_as_tiny():
        raise UserError(
            f"--scale={SCALE.value}: these models need another training than the tiny ones; give "
            f"--config=experiments/configs/ablate_{SCALE.value}.py, or a config of your own"
        )
    study = tables.make_study(SCALE.value, PART_NAMES.value)
    # Taken now: the code that runs is the one that was checked out when the process started.
    environment = describe_environment()
    corpus = load_corpus(base.data)
    configs = {
        name: dataclasses.replace(base, model=dataclasses.replace(model, dtype=base.model.dtype))
        for name, model in study.trained.items()
    }
    name = "ablate" if SCALE.value == "tiny" else f"ablate-{SCALE.value}"
    workdir = WORKDIR.value or f"runs/{name}"
    results = train_over_seeds(
        configs, SEEDS.value, corpus, workdir, environment, keep_checkpoints=KEEP.value
    )
    if results is None:
        return
    notes = tables.training_notes(study, base, corpus, SEEDS.value)
    for path in tables.write(study, results, RESULTS.value or f"experiments/results/{name}", notes):
        print(f"\n{path.read_text()}" if path.suffix == ".md" else f"figure: {path}")


def _trains_as_tiny() -> bool:
    """Whether the config is that of the tiny models, whatever single fields were set."""
    file = command_line.config_file()
    return file is None or file.resolve() == pathlib.Path(tiny_config.__file__).resolve()
