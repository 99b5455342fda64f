"""Generation against its definition: full passes over what is in the window, token by token."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.drawn import variables_of
from tests.support.users_compiler import memory_analysis
from ultramem_jax.config import ModelConfig, MoEConfig
from ultramem_jax.data import ByteTokenizer
from ultramem_jax.errors import UserError
from ultramem_jax.models import Transformer
from ultramem_jax.models.cache import empty_cache
from ultramem_jax.models.generation import (
    ENDED,
    Generator,
    continue_texts,
    stream_texts,
    text_generator,
)
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.presets import families

CONFIG = ModelConfig(
    vocab_size=257,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=16,
    memories={
        "memory": families.ultramem(
            placement="1:2", num_keys=8, top_m=4, num_heads=2, key_dim=8, value_dim=8, query_conv_width=3
        )
    },
)
PROMPTS = [[256, 5, 9, 200], [7], [256, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
GREEDY = Sampling(temperature=0)
FULL_PASS = jax.jit(Transformer(CONFIG).apply)


OTHERS = {
    # Fewer assignments in a step than experts.
    "moe": replace(
        CONFIG,
        num_heads=4,
        num_kv_heads=2,
        attention_qk_norm="all_heads",
        memories={},
        moe=MoEConfig(num_experts=16, top_k=2, expert_dim=8, activation="swiglu"),
        tie_embeddings=False,
    ),
    "a shared table": replace(
        CONFIG,
        mlp="swiglu",
        memories={
            "memory": families.ultramem_v2(
                placement="1:1/2:2",
                num_keys=8,
                top_m=4,
                num_heads=1,
                key_dim=8,
                value_dim=8,
                pre_value_dim=8,
                expansion=4,
                shuffle="explicit",
                query_conv_width=1,
            )
        },
    ),
}


def _variables(config):
    made = variables_of(config, seed=3)
    # Larger embeddings make confident predictions, so that greedy choices are no near ties.
    made["params"]["embedding"] = made["params"]["embedding"] * 5
    return made


@pytest.fixture(scope="module")
def variables():
    return prepare_for_decoding(CONFIG, _variables(CONFIG))


@pytest.fixture(scope="module")
def greedy(variables):
    return Generator(CONFIG, variables, window=16, sampling=GREEDY, prefill_chunk=4)


def _likeliest(variables, prompt, count, window):
    """Continues a prompt by the definition: the whole context for every token.

    Zeros follow the context, which does not see them: one program is compiled, not one for every length.

    The context is what the cache holds: all tokens, until the window is full; then the newer half of it.
    """
    ids = list(prompt)
    context = ids[-window:]
    for _ in range(count):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(context)] = context
        ids.append(int(FULL_PASS(variables, padded)[0, len(context) - 1].argmax()))
        context = ids[-max(window // 2, 1) :] if len(context) == window else [*context, ids[-1]]
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_temperature_zero_takes_the_likeliest_token(variables, greedy, prompt):
    assert greedy.generate([prompt], 5)[0].tolist() == _likeliest(variables, prompt, 5, 16)


def test_prompts_of_unequal_lengths_get_together_what_each_gets_by_itself(greedy):
    together = greedy.generate(PROMPTS, 5)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert found.tolist() == greedy.generate([prompt], 5)[0].tolist()


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_models_too_decode_as_their_full_passes_say(config):
    variables = _variables(config)  # not prepared: that is the generator's to do
    generator = Generator(config, variables, window=16, sampling=GREEDY, prefill_chunk=3)
    for prompt, found in zip(PROMPTS[:2], generator.generate(PROMPTS[:2], 6), strict=True):
        ids = jnp.asarray([[*prompt, *found]], jnp.int32)
        logits = jax.jit(Transformer(config).apply)(variables, ids)[0]
        assert found.tolist() == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_long_prompts_are_read_in_chunks_of_several_sizes():
    # 300 tokens in chunks of 256 and 64: a product of 256 rows has its operands in another order.
    layers = ModelConfig(vocab_size=50, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16)
    variables = _variables(layers)
    prompt = np.random.default_rng(2).integers(0, 50, 300)
    generator = Generator(layers, variables, window=310, sampling=GREEDY)
    found = generator.generate([prompt, prompt[:70]], 4)
    for start, continuation in zip((prompt, prompt[:70]), found, strict=True):
        ids = jnp.asarray([[*start, *continuation]], jnp.int32)
        logits = jax.jit(Transformer(layers).apply)(variables, ids)[0]
        assert continuation.tolist() == logits[len(start) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("window", [6, 1])
def test_of_a_window_that_is_full_the_newer_half_is_read_again(variables, window):
    generator = Generator(CONFIG, variables, window=window, sampling=GREEDY, prefill_chunk=4)
    for prompt in (PROMPTS[0], PROMPTS[2]):
        assert generator.generate([prompt], 9)[0].tolist() == _likeliest(variables, prompt, 9, window)


def test_two_programs_serve_a_batch_whatever_its_prompts(variables):
    generator = Generator(CONFIG, variables, window=16, prefill_chunk=4)
    generator.generate(PROMPTS[:2], 9)
    generator.generate(PROMPTS[1:], 3, seed=5)
    assert generator._step._cache_size() == generator._read_chunk._cache_size() == 1


@pytest.mark.parametrize(("batch", "heads"), [(1, 2), (3, 1)])
def test_a_step_changes_the_cache_in_place(batch, heads):
    # Wide heads, so that the scores of a query are far fewer than the keys that they are of.
    config = replace(CONFIG, embed_dim=64 * heads, num_heads=heads, num_kv_heads=heads, memories={})
    generator = Generator(config, _variables(config), window=512, sampling=GREEDY)
    cache = empty_cache(config, batch, 512)
    ones, number = jnp.ones(batch, jnp.int32), np.uint32(0)
    step = generator._step.lower(generator._variables, cache, ones, ones, number, number)
    memory, keys = memory_analysis(step), 4 * batch * heads * 512 * 64
    assert memory.alias_size_in_bytes >= 2 * 2 * keys
    assert memory.temp_size_in_bytes < keys / 2


def test_a_seed_gives_the_same_sample_again_and_another_seed_another(variables):
    generator = Generator(CONFIG, variables, window=16, sampling=Sampling(temperature=2.0))
    first, again, other = (generator.generate(PROMPTS[:1], 12, seed)[0] for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert (first != other).any()
    # A sequence's draws are its own, and the same prompt draws something else as another sequence.
    twice = generator.generate([PROMPTS[0], PROMPTS[0]], 12)
    chex.assert_trees_all_equal(first, twice[0])
    assert (first != twice[1]).any()


def test_each_sequence_ends_at_its_own_stop_token_which_is_not_part_of_it(variables, greedy):
    free = [found.tolist() for found in greedy.generate(PROMPTS, 8)]
    stop = free[0][3]
    generator = Generator(CONFIG, variables, window=16, sampling=GREEDY, stop_id=stop, prefill_chunk=4)
    for found, of_prompt in zip(generator.generate(PROMPTS, 8), free, strict=True):
        end = of_prompt.index(stop) if stop in of_prompt else 8
        assert found.tolist() == of_prompt[:end]
    # A sequence may be over before it begins.
    generator = Generator(CONFIG, variables, window=16, sampling=GREEDY, stop_id=free[0][0], prefill_chunk=4)
    assert generator.generate(PROMPTS, 8)[0].tolist() == []
    generator = Generator(CONFIG, variables, window=16, sampling=GREEDY, stop_id=stop, prefill_chunk=4)
    # When all have ended, so does the stream; until then there is ENDED in place of a token.
    steps = list(generator.stream(PROMPTS[:1], 8))
    assert [int(step[0]) for step in steps] == [*free[0][: free[0].index(stop)], ENDED]


def test_ids_that_the_tokenizer_does_not_have_are_never_sampled(variables):
    generator = Generator(CONFIG, variables, window=32, sampling=Sampling(temperature=100.0), num_ids=3)
    assert set(generator.generate(PROMPTS[:1], 20)[0].tolist()) == {0, 1, 2}


def test_text_is_continued_by_text(variables):
    tokenizer = ByteTokenizer()
    generator = text_generator(CONFIG, variables, tokenizer, window=16, sampling=GREEDY)
    prompts = ["key ", ""]  # an empty prompt is a document from its start
    texts = continue_texts(generator, tokenizer, prompts, 6)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = generator.generate([[256, *prompt.encode()]], 6)[0]
        assert text == tokenizer.decode(ids).decode(errors="replace")
    pieces = list(stream_texts(generator, tokenizer, prompts, 6))
    assert ["".join(of_text) for of_text in zip(*pieces, strict=True)] == texts
    assert len(pieces) > 2


def test_a_prompt_may_have_bytes_that_are_no_text(variables):
    # As Python gives them to a program that has them in its arguments.
    generator = text_generator(CONFIG, variables, ByteTokenizer(), window=16, sampling=GREEDY)
    (text,) = continue_texts(generator, ByteTokenizer(), [b"k\xff".decode(errors="surrogateescape")], 4)
    ids = generator.generate([[256, ord("k"), 255]], 4)[0]
    assert text == ByteTokenizer().decode(ids).decode(errors="replace")


def test_a_character_comes_with_the_last_of_its_bytes():
    class Fixed:
        def stream(self, prompts, num_tokens, seed):
            return (np.array([byte], np.int32) for byte in "é€".encode() + b"\xf0\x9f")

    pieces = stream_texts(Fixed(), ByteTokenizer(), ["x"], 7)
    assert [piece for (piece,) in pieces] == ["", "é", "", "", "€", "", "", "�"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, v: g.generate([], 1), r"prompts = 0: must be at least 1"),
        (lambda g, v: g.generate([[1], []], 1), r"prompts\[1\], its tokens = 0: must be at least 1"),
        (
            lambda g, v: g.generate([[1], [3, 257]], 1),
            r"\[1\] = '3 to 257': ids must be in \[0, 257\)",
        ),
        (lambda g, v: g.generate([[1]], 0), r"num_tokens = 0: must be at least 1"),
        (lambda g, v: Generator(CONFIG, v, window=0), r"window = 0: must be at least 1"),
        (lambda g, v: Generator(CONFIG, v, window=4, num_ids=258), r"num_ids = 258: must be in \[1, 257\]"),
        (lambda g, v: Sampling(top_p=0.0), r"top_p = 0.0: must be in \(0, 1\]"),
        (lambda g, v: Sampling(temperature=-1), r"temperature = -1: must be at least 0"),
        (lambda g, v: Generator(CONFIG, v, window=4, cache_dtype="int8"), "cache_dtype 'int8': known are"),
        (lambda g, v: g.stream([[1]], 1, seed=-1), r"seed = -1: must be in \[0, 2\*\*32\)"),
        (lambda g, v: g.stream([[1]], 1, seed=2**32), r"seed = 4294967296: must be in"),
    ],
)
def test_bad_input_is_named(variables, greedy, call, message):
    with pytest.raises(UserError, match=message):
        call(greedy, variables)
