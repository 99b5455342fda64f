"""Memories start as the papers' formulas and the layer itself say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.layers import Memory
from ultramem_jax.layers.memory.initializers import chosen_scores, memory_init, retrieval_init
from ultramem_jax.presets import families

V2 = families.ultramem_v2(num_keys=32, top_m=16, key_dim=32, value_dim=32, pre_value_dim=24, sharing="none")
LAYERS, WIDTH = 5, 64


def _site(config):
    return MemorySite.alone(config, WIDTH, num_layers=LAYERS, inner_ratio=3.0)


def _init(config):
    return memory_init(_site(config))


def _retrieval(config):
    return retrieval_init(_site(config))


def _std(initializer, shape=(400, 500)):
    return float(jnp.std(initializer(jax.random.key(0), shape, jnp.float32)))


def test_v2_tables_have_the_published_variance():
    scores = chosen_scores(V2.address, 32)
    spread = scores.mean_square / scores.mean**2
    assert 1.05 < spread < 1.3  # the paper's σ_s² is near 0.1
    # 0.2·k_inner·D / (m·H·(1 + σ_s²)·d_p·d_v·L), the variance of a product of two
    product = 0.2 * 3 * 64 / (16 * 1 * spread * 24 * 32 * 5)
    init = _init(V2)
    assert init.values_std == init.pre_values_std == pytest.approx(math.sqrt(math.sqrt(product)))
    assert _retrieval(V2).query_gain == pytest.approx(1 / math.sqrt(scores.mean))
    without = _init(V2.changed(pre_value_dim=0))
    assert without.values_std == pytest.approx(math.sqrt(product * 24))


def test_reference_has_the_constants_of_the_authors_code():
    config = families.ultramem(
        init="reference", key_dim=32, value_dim=16, expansion=4, rank_keys="full", num_keys=32
    )
    init, retrieval = _init(config), _retrieval(config)
    assert retrieval.query_gain == retrieval.key_gain == pytest.approx(32**-0.33)
    assert init.values_std == 0.02
    assert _std(retrieval.query) == _std(retrieval.keys) == pytest.approx(1 / math.sqrt(32), rel=0.01)
    assert _std(init.projection) == pytest.approx(1 / math.sqrt(4 * 16), rel=0.01)


def test_a_softmax_needs_no_gain():
    assert chosen_scores(families.pkm(value_dim=64).address, 128) == (1.0, 1.0)
    assert _retrieval(families.memory_plus(value_dim=64, init="paper")).query_gain == 1.0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (V2, 0.08 * 3 / LAYERS),  # docs/architecture.md, "Initialisation"
        (families.ultramem(num_keys=32, key_dim=64, value_dim=32, query_conv_width=0), 1 / (2 * LAYERS)),
        # A gate, and a GELU after pre-values, are made up for.
        (V2.changed(init="paper", rank_keys="split", pre_value_activation="gelu"), 1 / (2 * LAYERS)),
        (V2.changed(init="paper", rank_keys="split", pre_value_dim=0, gate=True), 1 / (2 * LAYERS)),
    ],
    ids=["v2", "paper", "paper, GELU", "paper, gate"],
)
def test_the_output_starts_with_the_variance_that_is_documented(config, expected):
    layer = Memory(_site(config))
    x = jax.random.normal(jax.random.key(1), (4, 64, WIDTH))
    draws = jax.jit(jax.vmap(lambda key: layer.init_with_output(key, x, train=False)[0]))
    y = np.asarray(draws(jax.random.split(jax.random.key(2), 16)))
    assert y.var() == pytest.approx(expected, rel=0.25)
