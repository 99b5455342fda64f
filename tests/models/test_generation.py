import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.config import MemoryConfig, ModelConfig
from ultramem_jax.data import ByteTokenizer
from ultramem_jax.models import Transformer
from ultramem_jax.models.generation import continue_text, generate_tokens

CONFIG = ModelConfig(
    vocab_size=257,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    mlp_dim=16,
    memory=MemoryConfig.ultramem(
        placement="1:2", num_keys=8, top_m=4, num_heads=2, key_dim=8, value_dim=8, query_conv_width=3
    ),
)
PROMPT = np.array([256, 5, 9, 200], np.int32)


@pytest.fixture(scope="module")
def variables():
    made = jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(3), jnp.zeros((1, 4), jnp.int32)))()
    # Larger embeddings make confident predictions, so that greedy choices are no near ties.
    made["params"]["embedding"] = made["params"]["embedding"] * 5
    return {name: made[name] for name in ("params", "memory", "buffers")}


def _greedy(variables, prompt, count, window):
    """From the definition: the whole visible sequence, unpadded, for every token."""
    ids, apply = list(prompt), jax.jit(Transformer(CONFIG).apply)
    for _ in range(count):
        logits = apply(variables, jnp.asarray([ids[-window:]], jnp.int32))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("window", [16, 5])
def test_temperature_zero_takes_the_likeliest_token_of_what_the_window_shows(variables, window):
    found = generate_tokens(CONFIG, variables, PROMPT, num_tokens=4, window=window, temperature=0.0)
    assert found.tolist() == _greedy(variables, PROMPT, 4, window)


def test_a_seed_gives_the_same_sample_again_and_another_seed_another(variables):
    samples = [
        generate_tokens(CONFIG, variables, PROMPT, num_tokens=12, window=16, temperature=2.0, seed=seed)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert (samples[0] != samples[2]).any()


def test_a_stop_token_ends_the_continuation_and_is_not_part_of_it(variables):
    free = generate_tokens(CONFIG, variables, PROMPT, num_tokens=8, window=16, temperature=0.0).tolist()
    stop = free[3]
    found = generate_tokens(CONFIG, variables, PROMPT, num_tokens=8, window=16, temperature=0.0, stop_id=stop)
    assert found.tolist() == free[: free.index(stop)]


def test_ids_that_the_tokenizer_does_not_have_are_never_sampled(variables):
    found = generate_tokens(CONFIG, variables, PROMPT, num_tokens=20, window=16, temperature=100.0, num_ids=3)
    assert set(found.tolist()) == {0, 1, 2}


def test_text_is_continued_by_text(variables):
    tokenizer = ByteTokenizer()
    text = continue_text(CONFIG, variables, tokenizer, "key ", num_tokens=6, window=16, temperature=0.0)
    ids = np.array([256, *b"key "], np.int32)
    expected = generate_tokens(CONFIG, variables, ids, num_tokens=6, window=16, temperature=0.0, stop_id=256)
    assert text == tokenizer.decode(expected).decode(errors="replace")
    # An empty prompt is a document from its start.
    assert isinstance(
        continue_text(CONFIG, variables, tokenizer, "", num_tokens=2, window=16, temperature=0.0), str
    )
