"""Continues a prompt, or a batch of prompts, and writes the text as it is generated.

The model is a run's checkpoint, or an open model: a folder of Hugging Face or a GGUF file. The text goes to
standard output. At the end, a line on standard error says how long it took.

    ultramem generate --workdir=runs/demo --prompt='import ' --num_tokens=100
    ultramem generate --model=model.gguf --prompt='The capital of France is' --temperature=0
"""

import sys

from absl import flags

from ultramem_jax.commands.continuations import write_continuations
from ultramem_jax.commands.given_model import given_model
from ultramem_jax.commands.model_and_tokenizer import GivenModel
from ultramem_jax.data import Tokenizer
from ultramem_jax.models.cache import CACHE_DTYPES
from ultramem_jax.models.generation import Generator, text_generator
from ultramem_jax.models.sampling import Sampling

FLAG_MODULES = (given_model.__module__,)

PROMPT = flags.DEFINE_multi_string(
    "prompt",
    ["def "],
    "text to continue; several prompts are decoded as one batch, and each finished text is printed under its "
    "prompt, in order",
)
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 200, "tokens to add to each prompt, at most", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.7, "temperature of the sampling; 0: takes the likeliest token", lower_bound=0.0
)
TOP_K = flags.DEFINE_integer("top_k", 0, "samples from the k likeliest tokens; 0: from all", lower_bound=0)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "samples from the likeliest tokens that together have this probability, in (0, 1]"
)
SEED = flags.DEFINE_integer("seed", 0, "seed of the sampling", lower_bound=0, upper_bound=2**32 - 1)
CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    "float32",
    CACHE_DTYPES,
    "dtype of the cached keys and values",
)
WINDOW = flags.DEFINE_integer(
    "window",
    0,
    "maximum context length in tokens; 0: data.seq_len, the length in training; of an open model as much as "
    "is needed, up to the longest that it was made for",
    lower_bound=0,
)
SPECIAL = flags.DEFINE_bool(
    "special_tokens",
    False,
    "whether written forms of special tokens in a prompt, such as <|im_start|>, become these tokens",
)


def main() -> None:
    """Writes the prompts and their continuations."""
    generator, tokenizer = _load()
    summary = write_continuations(
        generator, tokenizer, PROMPT.value, NUM_TOKENS.value, SEED.value, special=SPECIAL.value
    )
    print(summary, file=sys.stderr)


def _load() -> tuple[Generator, Tokenizer]:
    """Returns the generator that the flags describe, and its tokenizer; keeps nothing else that it loads."""
    # Made first: a value that is not allowed is reported before anything is read.
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    given = given_model()
    generator = text_generator(
        given.config,
        given.variables,
        given.tokenizer,
        window=WINDOW.value or _window(given),
        sampling=sampling,
        cache_dtype=CACHE_DTYPE.value,
    )
    return generator, given.tokenizer


def _window(given: GivenModel) -> int:
    """Returns the context of a run, or the positions that the prompts need with what is added to them.

    A step attends to all positions of the cache, so an open model does not get its longest context.
    """
    if given.run is not None:
        return given.max_length
    prompts = [prompt.encode(errors="surrogateescape") for prompt in PROMPT.value]
    longest = max(len(given.tokenizer.encode(prompt, SPECIAL.value)) for prompt in prompts)
    needed = longest + len(given.tokenizer.start_ids) + NUM_TOKENS.value
    return min(needed, given.config.max_length or needed)
