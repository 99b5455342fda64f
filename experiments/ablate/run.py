"""Measures the effect of each change of UltraMem: the ladder of the paper's table 2, the grids of table 3.

The ladder has twelve models, from Product-Key Memory to UltraMem; each differs from the previous one by one
change. The grids vary E, r and h, and try single changes. All models train on the same batches, over several
seeds. The tables show their differences beside the published ones.

After an interruption the same command resumes the experiment. Without --config, the training is that of
experiments/configs/ablate.py, for the tiny models. The models of the paper's sizes need another config.

    python launch.py ablate --parts=ladder --seeds=1
    python launch.py ablate --scale=151m --config=experiments/configs/ablate_151m.py
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
    "--config=FILE: a Python file with get_config() -> RunConfig; the file is executed, so use only files "
    "that you trust; --scale=151m needs one",
    "--config.data.field=value, --config.train.field=value: sets one of the fields below, explained in "
    "ultramem_jax/config/",
    "--config.model.dtype=value: the only field of the models that can be set; --scale chooses the models",
)

SCALE = flags.DEFINE_enum(
    "scale", "tiny", list(ladder.SCALES), "sizes of the models: tiny, or those of the paper"
)
PART_NAMES = flags.DEFINE_list("parts", list(tables.PARTS), "parts to train, of " + ", ".join(tables.PARTS))
SEEDS = flags.DEFINE_integer("seeds", 3, "number of runs of each config; seeds are 0, 1, ...", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "", "folder of the runs; empty: runs/ablate, or runs/ablate-151m")
RESULTS = flags.DEFINE_string(
    "results", "", "folder of tables and figures; empty: experiments/results/ablate, or ablate-151m"
)
KEEP = flags.DEFINE_bool("keep_checkpoints", False, "keep the checkpoints of runs that have ended")


def main() -> None:
    """Trains every config with every seed, and writes the tables and the figures."""
    base = command_line.run_config()
    if dataclasses.replace(base.model, dtype="float32") != ModelConfig():
        raise UserError("config.model: the models are those of --scale; dtype is all that can be set here")
    if SCALE.value != "tiny" and _trains_as_tiny():
        raise UserError(
            f"--scale={SCALE.value}: these models need another training than the tiny ones; give "
            f"--config=experiments/configs/ablate_{SCALE.value}.py, or a config of your own"
        )
    study = tables.make_study(SCALE.value, PART_NAMES.value)
    # Described at the start: the code that runs is the code that was checked out at that time.
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
    """Tells whether the config is the one of the tiny models, with or without overrides of fields."""
    file = command_line.config_file()
    return file is None or file.resolve() == pathlib.Path(tiny_config.__file__).resolve()
