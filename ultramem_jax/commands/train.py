"""Trains a language model, or resumes an interrupted run.

The same command again resumes from the newest complete checkpoint in --workdir. SIGTERM saves a checkpoint
and ends the process with status 75, which means: not done yet, run the same command again.

    ultramem train --config=demo --workdir=runs/demo --sample=300

A run may begin with an open model, a folder of Hugging Face or a GGUF file, and with memories added to it:

    ultramem train --init_from=model.gguf --add_memory=engram --config.train.trainable=^engram
"""

import pathlib

from absl import flags

from ultramem_jax import RunConfig
from ultramem_jax.cli import command_line
from ultramem_jax.commands import beginnings
from ultramem_jax.commands.continuations import write_continuations
from ultramem_jax.errors import Stopped
from ultramem_jax.models.generation import text_generator
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.parallel.distributed import is_first
from ultramem_jax.presets import preset
from ultramem_jax.reporting.folders import make_folder
from ultramem_jax.training.loop import train
from ultramem_jax.training.lora import merged
from ultramem_jax.training.metrics import plot_loss_curve
from ultramem_jax.training.profiling import Profile
from ultramem_jax.training.restore import load_model
from ultramem_jax.training.state import model_variables

BASE_CONFIG = RunConfig(model=preset("ultramem-tiny"))
CONFIG_FLAGS = beginnings.FLAGS

WORKDIR = flags.DEFINE_string("workdir", "", "folder of the run; empty: runs/<name of the preset or config>")
SAMPLE = flags.DEFINE_integer(
    "sample", 0, "tokens to sample from the trained model at the end; 0: none", lower_bound=0
)
PROFILE = flags.DEFINE_string(
    "profile", "", "folder for a profile of a few steps, which xprof and TensorBoard show; empty: none"
)


def main() -> None:
    """Trains the model, draws the loss curve, and prints commands to run next."""
    config = command_line.run_config()
    workdir = pathlib.Path(WORKDIR.value or f"runs/{command_line.config_name()}")
    profile = Profile(pathlib.Path(PROFILE.value)) if PROFILE.value else None
    if profile:
        make_folder(pathlib.Path(PROFILE.value), "--profile")
    initial = beginnings.initial_of_flags(config)
    result = train(config, workdir, profile=profile, initial=initial)
    if not result.finished:
        raise Stopped(
            f"stopped at step {result.step} of {config.train.steps}; the same command goes on from there"
        )
    if not is_first():
        return
    curve = workdir / "loss_curve.png"
    print(f"validation: {result.validation_bits_per_byte:.3f} bits per byte")
    try:
        plot_loss_curve(
            workdir / "metrics.jsonl", curve, f"{command_line.config_name()} on {config.data.dataset}"
        )
        print(f"loss curve: {curve}")
    except ValueError as error:  # the log is lost, but the run is complete
        print(f"no loss curve: {error}")
    print(f"checkpoint: {workdir / 'checkpoints'} (step {result.step})")
    if SAMPLE.value:
        prompt = "def "
        # The decoder runs on one device. A model that is split over devices is read from its checkpoint.
        alone = len(result.state.step.sharding.device_set) == 1
        generator = text_generator(
            config.model,
            merged(model_variables(result.state), config.train) if alone else load_model(workdir).variables,
            result.tokenizer,
            window=config.data.seq_len,
            sampling=Sampling(temperature=0.7),
        )
        print(f"\na continuation of {prompt!r}:")
        write_continuations(generator, result.tokenizer, [prompt], SAMPLE.value)
        print()
    print("next:")
    program = command_line.program()
    print(f"  {program} evaluate --workdir={workdir}")
    print(f"  {program} generate --workdir={workdir} --prompt='import '")
