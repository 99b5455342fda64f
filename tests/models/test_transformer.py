from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.drawn import COLLECTIONS, variables_of
from ultramem_jax.config import ModelConfig, MoEConfig
from ultramem_jax.layers import Memory, RMSNorm
from ultramem_jax.models import Transformer
from ultramem_jax.models.block import Block
from ultramem_jax.presets import families

BASE = ModelConfig(vocab_size=11, embed_dim=16, num_layers=3, num_heads=2, num_kv_heads=1, mlp_dim=24)
MEMORY = families.ultramem(num_keys=8, top_m=4, num_heads=2, key_dim=8, value_dim=8)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)), jnp.int32)


def _with_memory(placement):
    return replace(BASE, memories={"memory": MEMORY.changed(placement=placement)})


def _by_hand(config, variables):
    """Blocks and memories put together as the placement says, from the model's own weights."""
    params = variables["params"]
    x = params["embedding"][TOKENS]
    reads = {}
    for layer in range(1, config.num_layers + 1):
        for site in config.sites:
            if site.span == (layer, layer, "before"):
                x = x + Memory(site).apply(
                    {part: tree[site.name] for part, tree in variables.items()}, x, train=False
                )
        feeds = layer in config.feed_forward_layers
        x, h = Block(config, feeds).apply({"params": params[f"layer_{layer}"]}, x, train=False)
        assert ("feed_forward" in params[f"layer_{layer}"]) == feeds
        for site in (site for site in config.sites if site.span.place != "before"):
            if site.span.start == layer:
                of_memory = {part: tree[site.name] for part, tree in variables.items()}
                reads[site] = Memory(site).apply(of_memory, h, train=False)
            if site.span.end == layer:
                x = x + reads[site]
    x = RMSNorm(config.norm_eps).apply({"params": params["final_norm"]}, x)
    return x @ params["embedding"].T


@pytest.mark.parametrize(
    "placement",
    [
        "none",
        "full",
        "1:3",
        "1:2/3:3",
        "1:3/2:3",
        "2:2/1:2",
        "instead@2",
        "before@1/before@3",
        "before@2/instead@3/1:3",
    ],
)
def test_memories_read_and_land_where_the_placement_says(placement):
    config = _with_memory(placement)
    variables = variables_of(config)
    logits = jax.jit(Transformer(config).apply)(variables, TOKENS)
    chex.assert_shape(logits, (2, 7, 11))
    chex.assert_type(logits, jnp.float32)
    expected = jax.jit(lambda variables: _by_hand(config, variables))(variables)
    chex.assert_trees_all_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert len(variables.get("memory", {})) == len(config.sites)


def test_where_a_memory_lands_matters():
    variables = variables_of(_with_memory("1:3"))
    outputs = [jax.jit(Transformer(_with_memory(p)).apply)(variables, TOKENS) for p in ("1:1", "1:2", "1:3")]
    assert jnp.abs(outputs[0] - outputs[1]).max() > 1e-3 and jnp.abs(outputs[1] - outputs[2]).max() > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        BASE,
        _with_memory("1:2/3:3"),
        replace(BASE, moe=MoEConfig(num_experts=4, top_k=2, expert_dim=8), mlp="swiglu"),
    ],
    ids=["dense", "ultramem", "moe"],
)
def test_no_logit_depends_on_a_later_token(config):
    variables = variables_of(config)
    apply = jax.jit(Transformer(config).apply)
    later = TOKENS.at[:, 4:].set((TOKENS[:, 4:] + 3) % 11)
    before, after = apply(variables, TOKENS), apply(variables, later)
    chex.assert_trees_all_close(before[:, :4], after[:, :4], rtol=1e-4, atol=1e-5)
    assert (jnp.abs(before[:, 4:] - after[:, 4:]).max(axis=(0, 2)) > 1e-3).all()


def test_untied_output_has_weights_of_its_own():
    config = replace(BASE, tie_embeddings=False)
    params = variables_of(config)["params"]
    chex.assert_shape(params["output"], (16, 11))
    doubled = params | {"output": 2 * params["output"]}
    apply = jax.jit(Transformer(config).apply)
    once, twice = apply({"params": params}, TOKENS), apply({"params": doubled}, TOKENS)
    chex.assert_trees_all_close(twice, 2 * once, rtol=1e-6)
    assert "output" not in variables_of(BASE)["params"]


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    config = replace(_with_memory("1:2"), dtype="bfloat16")
    # Values as they start: with larger ones, near ties that send a token to another slot count for more.
    made = jax.jit(lambda: Transformer(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))()
    variables = {name: made[name] for name in COLLECTIONS if name in made}
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.jit(Transformer(config).apply)(variables, TOKENS)
    exact = jax.jit(Transformer(_with_memory("1:2")).apply)(variables, TOKENS)
    chex.assert_type(logits, jnp.float32)
    assert 0 < jnp.abs(logits - exact).mean() < 0.05 * jnp.abs(exact).mean()


def test_dropout_is_on_only_in_training():
    config = replace(_with_memory("1:2"), dropout=0.5)
    variables = variables_of(config)
    still = jax.jit(Transformer(_with_memory("1:2")).apply)(variables, TOKENS)
    chex.assert_trees_all_close(jax.jit(Transformer(config).apply)(variables, TOKENS), still, rtol=1e-6)

    @jax.jit
    def train(key):
        return Transformer(config).apply(variables, TOKENS, train=True, rngs={"dropout": key})

    noisy = [train(jax.random.key(k)) for k in (0, 1)]
    assert (noisy[0] != noisy[1]).any() and (noisy[0] != still).any()


def test_logits_start_with_a_variance_near_one():
    config = replace(_with_memory("1:2"), embed_dim=64, vocab_size=300)
    tokens = jnp.arange(128, dtype=jnp.int32).reshape(2, 64)
    logits = jax.jit(lambda: Transformer(config).init_with_output(jax.random.key(0), tokens)[0])()
    assert 0.7 < float(logits.std()) < 1.4
