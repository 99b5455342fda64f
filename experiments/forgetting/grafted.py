"""Adds a memory to an open model and trains it alone, until it carries a part of the model's loss."""

from dataclasses import replace
from pathlib import Path

from experiments.common.whole_runs import train_whole
from ultramem_jax.config import DataConfig, RunConfig, TrainConfig
from ultramem_jax.interop import open_models
from ultramem_jax.presets.grafts import graft
from ultramem_jax.training.initial import Initial
from ultramem_jax.training.restore import LoadedModel, load_model

MEMORY = "memory_plus"
"""Family and name of the memory. It is the one that sparse memory fine-tuning was published for."""
STEPS = 300
SEQ_LEN = 256


def grafted_run(model: Path, text: DataConfig) -> RunConfig:
    """Returns the run that trains the memory of an open model, with every other parameter frozen.

    Three memories share 65,536 slots, in a third, a half and three quarters of the layers: below them nothing
    needs a backward pass.

    Args:
        model: a `.gguf` file or a folder of Hugging Face.
        text: dataset and path of the background text.
    """
    config = open_models.read_config(model)
    layers = config.num_layers
    places = "/".join(f"{layer}:{layer}" for layer in (layers // 3, layers * 8 // 15, layers * 11 // 15))
    memory = graft(MEMORY, config).changed(placement=places, top_m=16)
    return RunConfig(
        replace(config, memories={MEMORY: memory}),
        replace(text, tokenizer=str(model), seq_len=SEQ_LEN),
        TrainConfig(
            steps=STEPS,
            batch_size=4,
            # A memory begins at zero, and rows learn through what is read of them: both need a high rate.
            learning_rate=2e-2,
            trainable=f"^{MEMORY}",
            eval_every=100,
            eval_batches=8,
            checkpoint_every=50,
            keep_last=1,
            keep_best=0,
        ),
    )


def train_graft(model: Path, text: DataConfig, workdir: Path) -> LoadedModel:
    """Trains the memory, or goes on with it, and returns the model with it."""
    config = grafted_run(model, text)

    def initial() -> Initial:
        _, variables = open_models.load(model)
        return Initial(variables, grafted=[MEMORY])

    train_whole(config, workdir, initial=initial)
    return load_model(workdir)
