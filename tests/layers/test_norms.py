import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.layers.norms import RMSNorm


def test_hand_worked():
    # mean(x²) = (9 + 16) / 2 = 12.5; with eps 3.5 the divisor is 4; the gain starts at 2.
    norm = RMSNorm(eps=3.5, gain_init=2.0)
    y, variables = norm.init_with_output(jax.random.key(0), jnp.asarray([[3.0, -4.0]], jnp.float32))
    chex.assert_trees_all_close(y, np.array([[1.5, -2.0]]), rtol=1e-6)
    chex.assert_type(variables["params"]["scale"], jnp.float32)
    gained = norm.apply({"params": {"scale": jnp.asarray([1.0, 3.0], jnp.float32)}}, jnp.asarray([3.0, -4.0]))
    chex.assert_trees_all_close(gained, np.array([0.75, -3.0]), rtol=1e-6)


@pytest.mark.parametrize("factor", [0.125, 64.0])
def test_scale_of_the_input_cancels(factor):
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    norm = RMSNorm(eps=0.0)
    variables = norm.init(jax.random.key(0), x)
    chex.assert_trees_all_close(norm.apply(variables, factor * x), norm.apply(variables, x), rtol=1e-5)


def test_statistics_are_float32_in_bfloat16():
    # 256 equal entries and one large one: summed in bfloat16, the squares of the small ones are lost.
    x = jnp.full((257,), 1.0, jnp.bfloat16).at[0].set(64.0)
    y = RMSNorm(eps=0.0, dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)[0]
    chex.assert_type(y, jnp.bfloat16)
    chex.assert_trees_all_close(float(y[0]), 64 / np.sqrt((64**2 + 256) / 257), rtol=2**-8)
