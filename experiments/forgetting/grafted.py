"""Adds a memory to an open model, trains its rows and readout on background text, and measures its worth."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from experiments.common.whole_runs import train_whole
from experiments.forgetting.fingerprints import fingerprint
from ultramem_jax.config import DataConfig, RunConfig, TrainConfig
from ultramem_jax.data import load_corpus
from ultramem_jax.interop import open_models
from ultramem_jax.presets.grafts import graft
from ultramem_jax.reporting.records import keep_record, kept_record
from ultramem_jax.training.evaluation import Evaluator
from ultramem_jax.training.initial import Initial, with_zero_outputs
from ultramem_jax.training.restore import LoadedModel, load_model

MEMORY = "memory_plus"
"""Family and name of the memory. It is the one that sparse memory fine-tuning was published for."""
STEPS = 150
SEQ_LEN = 256
EVAL_BATCHES = 8


def grafted_run(model: Path, text: DataConfig) -> RunConfig:
    """Returns the run that trains rows and readout of a memory in an open model; all else is frozen.

    Three memories share 65,536 slots. They stand after about a third, a half and three quarters of the
    layers: below the first nothing needs a backward pass.

    Args:
        model: a `.gguf` file or a folder of Hugging Face.
        text: dataset and path of the background text.
    """
    config = open_models.read_config(model)
    layers = config.num_layers
    after = (max(layer, 1) for layer in (layers // 3, layers * 8 // 15, layers * 11 // 15))
    places = "/".join(f"{layer}:{layer}" for layer in dict.fromkeys(after))
    memory = graft(MEMORY, config).changed(placement=places, top_m=16)
    return RunConfig(
        replace(config, memories={MEMORY: memory}),
        replace(text, tokenizer=str(model), seq_len=SEQ_LEN),
        TrainConfig(
            steps=STEPS,
            batch_size=4,
            # A memory begins at zero, and rows learn through what is read of them: both need a high rate.
            # Queries and keys would soon read the same few rows at such a rate, so they stay as they are.
            learning_rate=2e-2,
            trainable=rf"^{MEMORY}.*/(values|projection|gate)$",
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
    """Bits per byte of the model with its memory, on the same part."""


def train_graft(model: Path, text: DataConfig, workdir: Path) -> Grafted:
    """Trains rows and readout of the memory, and measures the model with it and without it."""
    config = grafted_run(model, text)

    def initial() -> Initial:
        _, variables = open_models.load(model)
        return Initial(variables, grafted=[MEMORY])

    train_whole(config, workdir, initial=initial)
    loaded = load_model(workdir)
    return Grafted(loaded, *_worth(loaded, workdir / "worth.json"))


def _worth(loaded: LoadedModel, kept: Path) -> tuple[float, float]:
    """Returns bits per byte without and with the memory, from a file if that is of this model."""
    model = fingerprint(loaded.config.model, loaded.variables)
    if kept.exists():
        with kept_record(kept, "what a memory is worth") as read:
            if read["model"] == model:
                return float(read["without_memory"]), float(read["with_memory"])
    evaluate = Evaluator(loaded.config, load_corpus(loaded.config.data, loaded.tokenizer))
    parts = loaded.variables["params"], loaded.variables["memory"]
    params, tables = with_zero_outputs(loaded.config.model, *parts, [MEMORY])
    alone = {**loaded.variables, "params": params, "memory": tables}
    without, with_memory = (
        evaluate(variables, batches=EVAL_BATCHES).bits_per_byte for variables in (alone, loaded.variables)
    )
    keep_record(kept, {"model": model, "without_memory": without, "with_memory": with_memory})
    return without, with_memory
