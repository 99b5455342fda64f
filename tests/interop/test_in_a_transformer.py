"""Loaded layers fit into a model: same names, same shapes."""

import chex
import jax
import jax.numpy as jnp
import pytest

from tests.support import synthetic
from ultramem_jax.config import ModelConfig
from ultramem_jax.interop.reference_torch import load
from ultramem_jax.models import Transformer


@pytest.mark.parametrize("name", ["v2_summed_gelu", "v2_everything"])
def test_loaded_layers_take_their_places_in_a_transformer(name):
    hyper = synthetic.CASES[name]
    module, loaded = load(synthetic.random_state(hyper, 0), hyper)
    config = ModelConfig(
        vocab_size=11,
        embed_dim=10,
        num_layers=hyper["layers"],
        num_heads=1,
        num_kv_heads=1,
        mlp_dim=8,
        memories={"memory": module.reference.config},
    )
    model, tokens = Transformer(config), jnp.arange(8)[None] % 11
    own = jax.jit(lambda: model.init(jax.random.key(0), tokens))()
    buffers = {
        memory: {key: jnp.asarray(value) for key, value in of_memory.items()}
        for memory, of_memory in loaded["buffers"].items()
    }
    moved = {
        "params": own["params"] | loaded["params"],
        "memory": {"memory_tables": loaded["memory"]["tables"]},
        "buffers": buffers,
    }
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, dict(own))
    logits = jax.jit(model.apply)(moved, tokens)
    chex.assert_tree_all_finite(logits)
    assert (logits != jax.jit(model.apply)(own, tokens)).any()
