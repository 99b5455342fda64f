"""Adds a memory to an open model, trains it alone on background text, and measures what it is worth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from experiments.common.whole_runs import train_whole
from ultramem_jax.config import DataConfig, RunConfig, TrainConfig
from ultramem_jax.data import load_corpus
from ultramem_jax.files import replace_text
from ultramem_jax.interop import open_models
from ultramem_jax.presets.grafts import graft
from ultramem_jax.training.evaluation import Evaluator
from ultramem_jax.training.initial import Initial, with_zero_outputs
from ultramem_jax.training.restore import LoadedModel, load_model

MEMORY = "memory_plus"
"""Family and name of the memory. It is the one that sparse memory fine-tuning was published for."""
STEPS = 300
SEQ_LEN = 256
EVAL_BATCHES = 8


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
            eval_batches=EVAL_BATCHES,
            checkpoint_every=50,
            keep_last=1,
            keep_best=0,
        ),
    )


class Grafted(NamedTuple):
    """Holds a model with a memory that was trained alone, and what it is worth."""

    model: LoadedModel
    without_memory: float
    """Bits per byte of the open model alone, on a part of the validation split."""
    with_memory: float
    """The same with the memory."""


def train_graft(model: Path, text: DataConfig, workdir: Path) -> Grafted:
    """Trains the memory, or goes on with it, and measures the model with it and without it."""
    config = grafted_run(model, text)

    def initial() -> Initial:
        _, variables = open_models.load(model)
        return Initial(variables, grafted=[MEMORY])

    train_whole(config, workdir, initial=initial)
    loaded, kept = load_model(workdir), workdir / "worth.json"
    if not kept.exists():
        evaluate = Evaluator(loaded.config, load_corpus(loaded.config.data, loaded.tokenizer))
        parts = loaded.variables["params"], loaded.variables["memory"]
        params, tables = with_zero_outputs(loaded.config.model, *parts, [MEMORY])
        alone = {**loaded.variables, "params": params, "memory": tables}
        found = [
            evaluate(variables, batches=EVAL_BATCHES).bits_per_byte for variables in (alone, loaded.variables)
        ]
        replace_text(kept, json.dumps(found))
    without_memory, with_memory = json.loads(kept.read_text(encoding="utf-8"))
    return Grafted(loaded, without_memory, with_memory)
