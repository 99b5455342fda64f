"""Continues a prompt, or several as one batch, with a run's checkpoint; the text comes as it is made.

The text goes to standard output. When it is complete, a line on standard error says how long it took.
"""

import sys

from absl import flags

from ultramem_jax.commands.continuations import write_continuations
from ultramem_jax.data import Tokenizer
from ultramem_jax.models.cache import CACHE_DTYPES
from ultramem_jax.models.generation import Generator, text_generator
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.training.restore import load_model

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "folder of the run")
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "`last`, `best` (validation loss), or a step")
PROMPT = flags.DEFINE_multi_string(
    "prompt",
    ["def "],
    "text to continue; given several times, they are decoded as one batch, and each finished continuation is "
    "printed under its prompt, in order",
)
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 200, "tokens to add to each prompt, at most", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", 0, "draws among the k likeliest tokens; 0: all", lower_bound=0)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "draws among the likeliest tokens that together have this probability, in (0, 1]"
)
SEED = flags.DEFINE_integer("seed", 0, "of the sampling", lower_bound=0, upper_bound=2**32 - 1)
CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    "float32",
    CACHE_DTYPES,
    "of the keys and values that are kept of earlier tokens",
)
WINDOW = flags.DEFINE_integer(
    "window", 0, "tokens of context at most; 0: data.seq_len, the length trained on", lower_bound=0
)


def main() -> None:
    """Writes the prompts and their continuations."""
    generator, tokenizer = _load()
    summary = write_continuations(generator, tokenizer, PROMPT.value, NUM_TOKENS.value, SEED.value)
    print(summary, file=sys.stderr)


def _load() -> tuple[Generator, Tokenizer]:
    """The generator that the flags describe. What was loaded for it and is not part of it is dropped."""
    # First, so that a value that is not allowed is said before anything is read.
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    loaded = load_model(WORKDIR.value, CHECKPOINT.value)
    generator = text_generator(
        loaded.config.model,
        loaded.variables,
        loaded.tokenizer,
        window=WINDOW.value or loaded.config.data.seq_len,
        sampling=sampling,
        cache_dtype=CACHE_DTYPE.value,
    )
    return generator, loaded.tokenizer
