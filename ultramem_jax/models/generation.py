"""Sampling from a model by full forward passes over a window, without a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.data.tokenizers import Tokenizer
from ultramem_jax.models.transformer import Transformer


def generate_tokens(
    config: ModelConfig,
    variables: dict[str, Any],
    prompt: np.ndarray,
    *,
    num_tokens: int,
    window: int,
    temperature: float,
    seed: int = 0,
    stop_id: int | None = None,
    num_ids: int | None = None,
) -> np.ndarray:
    """Samples a continuation, one token at a time.

    Args:
        config: of the model.
        variables: `params`, `memory` and `buffers`.
        prompt: (P,) int32, P >= 1; its last `window` tokens are seen.
        num_tokens: how many to add at most.
        window: tokens of context, the length that the model was trained on.
        temperature: logits are divided by it; 0 takes the likeliest token.
        seed: of the sampling.
        stop_id: ends the continuation, and is not part of it.
        num_ids: only ids below it are sampled, those that the tokenizer has; None is all of the model's.

    Returns:
        (<= num_tokens,) int32.
    """
    model = Transformer(config)

    @jax.jit
    def next_token(variables: Any, context: jax.Array, length: jax.Array, key: jax.Array) -> jax.Array:
        # The context is padded on the right: a causal model does not see it from where it reads.
        every: Any = model.apply(variables, context[None])
        logits = every[0, length - 1, :num_ids]
        if temperature == 0:
            return logits.argmax().astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    ids = [int(i) for i in prompt]
    keys = jax.random.split(jax.random.key(seed), num_tokens)
    for i in range(num_tokens):
        seen = ids[-window:]
        context = np.zeros(window, np.int32)
        context[: len(seen)] = seen
        token = int(next_token(variables, context, len(seen), keys[i]))
        if token == stop_id:
            break
        ids.append(token)
    return np.asarray(ids[len(prompt) :], np.int32)


def continue_text(
    config: ModelConfig,
    variables: dict[str, Any],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_tokens: int,
    window: int,
    temperature: float,
    seed: int = 0,
) -> str:
    """`generate_tokens` from text to text; stops at the end of a document.

    The end-of-document token goes before the prompt, which therefore may be empty: it is what documents
    follow in training.
    """
    start = np.concatenate([[tokenizer.eos_id], tokenizer.encode(prompt.encode())]).astype(np.int32)
    ids = generate_tokens(
        config,
        variables,
        start,
        num_tokens=num_tokens,
        window=window,
        temperature=temperature,
        seed=seed,
        stop_id=tokenizer.eos_id,
        num_ids=tokenizer.vocab_size,
    )
    return tokenizer.decode(ids).decode(errors="replace")
