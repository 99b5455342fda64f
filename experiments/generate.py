"""Continues a prompt with a run's checkpoint."""

import sys

from absl import flags

from ultramem_jax.models.generation import continue_text
from ultramem_jax.training.restore import load_model

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "folder of the run")
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "`last`, `best` (validation loss), or a step")
PROMPT = flags.DEFINE_string("prompt", "def ", "text to continue")
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 200, "tokens to add", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "of the sampling")


def main() -> None:
    """Prints the prompt and its continuation."""
    loaded = load_model(WORKDIR.value, CHECKPOINT.value)
    text = continue_text(
        loaded.config.model,
        loaded.variables,
        loaded.tokenizer,
        PROMPT.value,
        num_tokens=NUM_TOKENS.value,
        window=loaded.config.data.seq_len,
        temperature=TEMPERATURE.value,
        seed=SEED.value,
    )
    sys.stdout.write(PROMPT.value + text + "\n")
