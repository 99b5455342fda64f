"""Continues fixed prompts greedily, as a look at what a model says."""

from experiments.open_models.records import Continuation
from ultramem_jax.config import ModelConfig
from ultramem_jax.data import Tokenizer
from ultramem_jax.models.generation import continue_texts, text_generator
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.tree_types import ArrayTree

PROMPTS = (
    "The old lighthouse keeper climbed the stairs one last time, and",
    "Photosynthesis is the process by which",
    'def fibonacci(n):\n    """Returns the n-th Fibonacci number."""\n',
    "import json\n\n\ndef read_config(path):\n",
    "Question: What is the capital of France, and which river runs through it?\nAnswer:",
    "12 + 7 = 19\n30 + 25 = 55\n41 + 8 =",
)
"""Two prompts of prose, two of code, a question, and arithmetic."""
NEW_TOKENS = 48
_WINDOW = 256
"""Most tokens of a prompt and its continuation."""


def continue_prompts(
    config: ModelConfig, variables: dict[str, ArrayTree], tokenizer: Tokenizer
) -> list[Continuation]:
    """Returns the greedy continuations of `PROMPTS`, of up to `NEW_TOKENS` tokens each."""
    greedy = Sampling(temperature=0.0)
    generator = text_generator(config, variables, tokenizer, window=_WINDOW, sampling=greedy)
    # Prompts are continued one by one: rows of a batch round their sums in other ways.
    return [
        Continuation(prompt, *continue_texts(generator, tokenizer, [prompt], NEW_TOKENS))
        for prompt in PROMPTS
    ]
