import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.activations import gelu64, silu64
from ultramem_jax import ModelConfig
from ultramem_jax.layers.mlp import MLP, activated

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)


def init(layer, x):
    return jax.jit(lambda x: layer.init_with_output(jax.random.key(0), x, train=False))(x)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_equals_float64(kind):
    mlp = MLP(ModelConfig(embed_dim=8, mlp=kind, mlp_dim=12))
    y, variables = init(mlp, X)
    w = {name: np.asarray(value, np.float64) for name, value in variables["params"].items()}
    x = X.astype(np.float64)
    inner = gelu64(x @ w["w_in"]) if kind == "gelu" else silu64(x @ w["w_gate"]) * (x @ w["w_in"])
    chex.assert_trees_all_close(y, inner @ w["w_out"], rtol=1e-5, atol=1e-6)


def test_gelu_is_near_the_exact_one():
    x = np.linspace(-6, 6, 1001)
    exact = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    chex.assert_trees_all_close(
        jax.jit(activated)(jnp.asarray(x, jnp.float32), None), exact, rtol=1e-7, atol=5e-4
    )


def test_initial_scales():
    # N(0, 1/fan_in) in, N(0, 1/(2L·fan_in)) out: D 64, F 256, L 8; 16,384 draws each, so within a few %.
    config = ModelConfig(embed_dim=64, mlp="swiglu", mlp_dim=256, num_layers=8)
    w = init(MLP(config), jnp.zeros((1, 1, 64), jnp.float32))[1]["params"]
    w = {name: np.asarray(value) for name, value in w.items()}
    assert w["w_in"].std() == pytest.approx(1 / 8, rel=0.03)
    assert w["w_gate"].std() == pytest.approx(1 / 8, rel=0.03)
    assert w["w_out"].std() == pytest.approx(1 / (16 * 4), rel=0.03)


def test_computes_in_bfloat16_on_float32_parameters():
    mlp = MLP(ModelConfig(embed_dim=8, mlp_dim=12, dtype="bfloat16"))
    y, variables = init(mlp, X)
    chex.assert_type(y, jnp.bfloat16)
    assert {w.dtype.name for w in jax.tree.leaves(variables)} == {"float32"}
    full = jax.jit(lambda v: MLP(ModelConfig(embed_dim=8, mlp_dim=12)).apply(v, X, train=False))(variables)
    chex.assert_trees_all_close(y.astype(np.float32), full, rtol=1e-7, atol=0.02)
