"""Evaluation against brute force: the model run on the window of every target by itself."""

import itertools
import math
import pathlib

import chex
import jax
import numpy as np
import pytest

from tests.data.trained_tokenizers import sentencepiece
from ultramem_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.data import load_corpus, open_tokenizer
from ultramem_jax.models import Transformer
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes, one_device
from ultramem_jax.presets import families
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.evaluation import Evaluation, Evaluator, TargetBytes, bits_per_byte
from ultramem_jax.training.loop import train
from ultramem_jax.training.metrics import read_metrics
from ultramem_jax.training.restore import load_model
from ultramem_jax.training.state import fresh_state, model_variables

S = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A model with a memory, and a corpus of 4000 bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["memory", "slot", "key", "query", "\n", "token ", "value;"]
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 3000))[:4000])
    memory = families.ultramem(
        placement="1:1", num_keys=8, top_m=4, num_heads=2, key_dim=8, value_dim=8, partition="both"
    )
    return RunConfig(
        ModelConfig(
            embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16, memories={"memory": memory}
        ),
        DataConfig("text", str(folder / "text.txt"), seq_len=S, cache_dir=str(folder / "cache")),
        TrainConfig(
            steps=4,
            batch_size=8,
            learning_rate=1e-2,
            warmup_fraction=0.0,
            eval_every=2,
            eval_batches=0,
            checkpoint_every=2,
        ),
        MeshConfig(data=2, memory=2, width=2),
    )


@pytest.fixture(scope="module")
def variables(config):
    state = fresh_state(config, make_optimizers(config), one_device(), np.uint32(0))
    # Ten times as large, so that losses depend on what is read and on the context.
    return jax.tree.map(lambda a: 10 * a, model_variables(state))


def validation_tokens(config):
    text = pathlib.Path(config.data.path).read_bytes()
    return np.append(np.frombuffer(text[3600:3800], np.uint8).astype(np.int32), 256)


def loss_of_each(config, variables, stride):
    """Returns the loss of every target in the first window that has it; a window starts every `stride`."""
    tokens = validation_tokens(config)
    apply = jax.jit(Transformer(config.model).apply)
    losses = []
    for target in range(1, len(tokens)):
        start = next(start for start in itertools.count(0, stride) if start + S >= target)
        if start + S >= len(tokens):
            break  # the window is not whole
        logits = np.asarray(apply(variables, tokens[None, start : start + S]), np.float64)
        scores = logits[0, target - 1 - start]
        losses.append(np.log(np.exp(scores).sum()) - scores[tokens[target]])
    return losses


def test_it_is_the_mean_over_targets_each_in_its_own_window(config, variables):
    corpus = load_corpus(config.data)
    evaluate = Evaluator(config, corpus)
    means = []
    for stride, counted in ((1, 200), (5, 196), (S, 192)):
        expected = loss_of_each(config, variables, stride)
        found = evaluate(variables, "validation", 0, stride=stride)
        assert found.tokens == len(expected) == counted
        chex.assert_trees_all_close(found.loss, np.mean(expected), rtol=1e-6)
        # Every target is a byte but the last one, which ends the document and which only stride 1 reaches.
        num_bytes = counted - (stride == 1)
        chex.assert_trees_all_close(found.bits_per_byte, np.sum(expected) / np.log(2) / num_bytes, rtol=1e-6)
        means.append(found.loss)
    # The context does matter here.
    assert all(abs(a - b) > 1e-3 for a, b in itertools.combinations(means, 2))
    # Windows that advance by their length are the disjoint sequences of training.
    assert evaluate(variables, "validation", 0) == found


def test_a_checkpoint_of_another_mesh_gives_the_losses_that_its_run_recorded(config, tmp_path):
    trained = train(config, tmp_path, progress=False)
    table = trained.state.tables["memory_0"]["values"]
    assert len(table.sharding.device_set) == 8
    assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 2, table.shape[1] // 2)
    recorded = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "validation"}
    assert set(recorded) == {2, 4}
    corpus = load_corpus(config.data)
    for step, record in recorded.items():
        loaded = load_model(tmp_path, step)
        assert {len(a.sharding.device_set) for a in jax.tree.leaves(loaded.variables)} == {1}
        evaluate = Evaluator(loaded.config, corpus)
        found = evaluate(loaded.variables)
        chex.assert_trees_all_close(found.loss, record["loss"], rtol=1e-5)
        chex.assert_trees_all_close(found.bits_per_byte, record["bits_per_byte"], rtol=1e-5)
    # And so does a sliding window, on either mesh.
    there = Evaluator(config, corpus, mesh_axes(config, make_mesh(config.mesh)))
    of_mesh = there(model_variables(trained.state), stride=5)
    alone = evaluate(loaded.variables, stride=5)
    assert of_mesh.tokens == alone.tokens == 196
    chex.assert_trees_all_close(alone.loss, of_mesh.loss, rtol=1e-5)


def test_bits_per_byte_are_all_bits_over_all_bytes():
    assert bits_per_byte(np.log(2) * 3, 1) == pytest.approx(3.0)
    assert bits_per_byte(np.log(2) * 3, 4) == pytest.approx(0.75)
    assert bits_per_byte(1.0, 0) == math.inf


def test_bytes_of_targets_are_those_of_the_text_before_which_a_tokenizer_puts_a_blank(tmp_path):
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path)
    documents = [b"the cat", b"", b" sat on", "\n漢字か \n the mat".encode()]
    stream = [i for data in documents for i in (1, *tokenizer.encode(data).tolist(), 2)]
    count = TargetBytes(tokenizer, one_device())
    assert int(count(np.array([stream]))) == sum(map(len, documents))
    # The same targets in windows of three, each of which begins where the one before ends.
    padded = [*stream, *[0] * 3]
    windows = np.array([padded[start : start + 4] for start in range(0, len(stream) - 1, 3)])
    mask = np.arange(windows[:, 1:].size).reshape(-1, 3) < len(stream) - 1
    assert int(count(windows, mask)) == sum(map(len, documents))
    # The same token stands for one byte more inside a document.
    (first,) = tokenizer.encode(b" ")[:1]
    assert [int(count(np.array([[before, first]]))) for before in (1, 2, 300)] == [0, 0, 1]


def test_perplexity_is_of_a_token():
    assert Evaluation(np.log(5), 1.0, 10).perplexity == pytest.approx(5)
    assert Evaluation(1e4, 1.0, 10).perplexity == math.inf
    assert math.isnan(Evaluation(math.nan, math.nan, 0).perplexity)
