"""A memory that is addressed by tokens reads through the canonical ids of its run's tokenizer."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from tests.support.small_run import small_config
from ultramem_jax.data import load_corpus
from ultramem_jax.data.canonical_ids import canonical_ids
from ultramem_jax.models import Transformer
from ultramem_jax.models.generation import continue_texts, text_generator
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.presets import families
from ultramem_jax.training.loop import train
from ultramem_jax.training.restore import load_model

ENGRAM = families.engram(placement="before@1", heads_per_order=2, rows_per_head=(101,), value_dim=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Six steps of a model with Engram, on text in upper and lower case, by byte pairs."""
    folder = tmp_path_factory.mktemp("maps")
    config = small_config(folder)
    words = np.random.default_rng(0).choice(["Memory", "memory", "MEMORY", "slot", "Slot", "\n", "é"], 4000)
    (folder / "text.txt").write_text(" ".join(words))
    model = replace(config.model, vocab_size=300, memories={"engram": ENGRAM})
    data = replace(config.data, tokenizer="bpe", bpe_vocab_size=280)
    return replace(config, model=model, data=data)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with jax.numpy_dtype_promotion("standard"):
        return train(config, folder, progress=False), folder


def test_training_takes_the_map_of_its_tokenizer(config, trained):
    result, folder = trained
    loaded, tokenizer = load_model(folder), load_corpus(config.data).tokenizer
    expected = canonical_ids(tokenizer)
    assert expected.max() + 1 < len(expected)  # some tokens read the same
    address = loaded.config.model.memories["engram"].address
    assert address.num_canonical_ids == expected.max() + 1
    found = np.asarray(loaded.variables["buffers"]["engram_0"]["canonical_ids"])
    chex.assert_shape(found, (300,))
    chex.assert_trees_all_equal(found[: len(expected)], expected)
    assert (found[len(expected) :] == expected[0]).all()  # padding, the token 0, for ids that are no token
    chex.assert_trees_all_equal(found, result.state.buffers["engram_0"]["canonical_ids"])


def test_tokens_that_read_the_same_read_the_same_rows(trained):
    loaded = load_model(trained[1])
    canonical = np.asarray(loaded.variables["buffers"]["engram_0"]["canonical_ids"])
    one, other = next(
        ids for c in range(canonical.max()) if len(ids := np.flatnonzero(canonical[:250] == c)) > 1
    )[:2]
    tokens = np.array([[7, one, 9], [7, other, 9]])
    apply = jax.jit(lambda *args: Transformer(loaded.config.model).apply(*args, mutable=["reads"]))
    _, sown = apply(loaded.variables, tokens)
    slots = np.asarray(sown["reads"]["engram_0"]["slots"]).reshape(2, 3, -1)
    chex.assert_trees_all_equal(slots[0], slots[1])


def test_it_generates_what_whole_passes_would(trained):
    loaded = load_model(trained[1])
    model, tokenizer = loaded.config.model, loaded.tokenizer
    greedy = Sampling(temperature=0.0)
    generator = text_generator(model, loaded.variables, tokenizer, window=32, sampling=greedy)
    (text,) = continue_texts(generator, tokenizer, ["Memory slot"], 4)
    # The same, each token from a pass over all that came before; what comes after is not seen.
    ids = [tokenizer.eos_id, *tokenizer.encode(b"Memory slot").tolist()]
    begin, apply = len(ids), jax.jit(Transformer(model).apply)
    for _ in range(4):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        logits = apply(loaded.variables, padded)
        ids.append(int(np.argmax(logits[0, len(ids) - 1, : tokenizer.vocab_size])))
    assert text == tokenizer.decode(ids[begin:]).decode(errors="replace")
