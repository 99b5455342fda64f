import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax import ModelConfig
from ultramem_jax.config import RopeScalingConfig
from ultramem_jax.layers import attention
from ultramem_jax.layers.attention import Attention, rotary, rotary_frequencies
from ultramem_jax.layers.caching import next_chunk

THETA = 100.0


def config(**fields):
    return ModelConfig(**(dict(embed_dim=16, num_heads=4, num_kv_heads=2, rope_theta=THETA) | fields))


def inputs(length, batch=2):
    return np.random.default_rng(0).normal(size=(batch, length, 16)).astype(np.float32)


@functools.cache
def variables_of(num_kv_heads=2, **fields):
    layer = Attention(config(num_kv_heads=num_kv_heads, **fields))
    return jax.jit(lambda x: layer.init(jax.random.key(0), x, train=False))(inputs(1))


def run(layer, variables, *args, **fields):
    """`layer.apply`, compiled as one program: op by op takes many times as long."""
    return jax.jit(lambda variables, *args: layer.apply(variables, *args, **fields))(variables, *args)


def frequencies64(half, scaling=None):
    """theta^(-i/half); with a scaling, those of long wavelengths are lowered, one at a time."""
    found = []
    for i in range(half):
        frequency = THETA ** (-i / half)
        if scaling is not None:
            wavelength, length = 2 * np.pi / frequency, scaling.original_length
            lowered = frequency / scaling.factor
            if wavelength > length / scaling.low_freq_factor:
                frequency = lowered
            elif wavelength > length / scaling.high_freq_factor:
                span = scaling.high_freq_factor - scaling.low_freq_factor
                kept = (length / wavelength - scaling.low_freq_factor) / span
                frequency = kept * frequency + (1 - kept) * lowered
        found.append(frequency)
    return np.array(found)


def rotary64(x, position, scaling=None):
    """One head's features (d,) as complex numbers x_i + i·x_(i + d/2), turned."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies64(half, scaling))
    return np.concatenate([turned.real, turned.imag])


def normed64(x, gain):
    return x / np.sqrt(np.mean(x**2) + 1e-5) * np.asarray(gain["scale"], np.float64)


def attention64(x, w, heads, kv_heads, norm="all_heads", scaling=None):
    """Definition, one query and head at a time; norms and biases act where their parameters are given."""
    x = x.astype(np.float64)
    norms = {name: w[name] for name in ("query_norm", "key_norm") if name in w}
    w = {name: np.asarray(value, np.float64) for name, value in w.items() if name not in norms}
    batch, length, _ = x.shape
    d = w["w_query"].shape[1] // heads
    out = np.zeros_like(x)

    def heads_of(token, name):
        """The vectors (heads, d) of a token: its queries, keys or values."""
        y = token @ w[f"w_{name}"] + w.get(f"{name}_bias", 0)
        gain = norms.get(f"{name}_norm")
        if gain is not None and norm == "all_heads":
            y = normed64(y, gain)
        y = y.reshape(-1, d)
        return np.array([normed64(one, gain) for one in y]) if gain is not None and norm == "per_head" else y

    for b in range(batch):
        for s in range(length):
            pooled = []
            for a in range(heads):
                kv = a // (heads // kv_heads)
                q = rotary64(heads_of(x[b, s], "query")[a], s, scaling)
                k = np.array([rotary64(heads_of(x[b, u], "key")[kv], u, scaling) for u in range(s + 1)])
                v = np.array([heads_of(x[b, u], "value")[kv] for u in range(s + 1)])
                weight = np.exp(k @ q / np.sqrt(d))
                pooled.append(weight @ v / weight.sum())
            out[b, s] = np.concatenate(pooled) @ w["w_out"] + w.get("output_bias", 0)
    return out


def test_rotary_hand_worked():
    # d 4, theta 100: frequencies 1 and 100^(-1/2) = 0.1; at position 2 the angles are 2 and 0.2 radians.
    # (1, 0 | 0, 1): feature pair 0 is (1, 0) -> (cos 2, sin 2), pair 1 is (0, 1) -> (-sin 0.2, cos 0.2).
    x = jnp.asarray([1.0, 0.0, 0.0, 1.0], jnp.float32).reshape(1, 1, 1, 4)
    y = jax.jit(rotary)(x, jnp.asarray([2], jnp.int32), rotary_frequencies(4, 100.0))
    chex.assert_trees_all_close(
        y.ravel(), np.array([np.cos(2), -np.sin(0.2), np.sin(2), np.cos(0.2)]), rtol=1e-6
    )


def test_rotary_products_depend_only_on_distance():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    @jax.jit
    def product(query_at, key_at):
        at = [
            rotary(x, jnp.asarray([p]), rotary_frequencies(8, THETA)) for x, p in ((q, query_at), (k, key_at))
        ]
        return jnp.sum(at[0] * at[1])

    assert float(product(7, 4)) == pytest.approx(float(product(103, 100)), abs=1e-4)
    assert float(product(7, 4)) != pytest.approx(float(product(7, 5)), abs=1e-2)


def test_rotary_takes_positions_per_sequence():
    x = np.random.default_rng(0).normal(size=(2, 3, 1, 4)).astype(np.float32)
    positions = jnp.asarray([[0, 1, 2], [5, 6, 7]], jnp.int32)
    turn, frequencies = jax.jit(rotary), rotary_frequencies(4, THETA)
    y = np.asarray(turn(x, positions, frequencies))
    chex.assert_trees_all_close(y[0], np.asarray(turn(x, positions[0], frequencies))[0], rtol=1e-7, atol=1e-6)
    chex.assert_trees_all_close(y[1], np.asarray(turn(x, positions[1], frequencies))[1], rtol=1e-7, atol=1e-6)


def test_scaled_frequencies_are_those_of_llama():
    # Llama 3.1: theta 500,000, heads of 128. By its formula, frequencies 0 to 28 stay, 29 to 34 are between,
    # and those from 35 on are an eighth.
    scaling = RopeScalingConfig()
    plain, scaled = (rotary_frequencies(128, 500_000.0, of) for of in (None, scaling))
    ratio = scaled.astype(np.float64) / plain
    chex.assert_trees_all_equal(scaled[:29], plain[:29])
    chex.assert_trees_all_close(ratio[35:], np.full(29, 1 / 8), rtol=1e-6)
    assert (np.diff(ratio[28:36]) < 0).all()
    wavelength = 2 * np.pi / plain[30].astype(np.float64)
    kept = (8192 / wavelength - 1) / (4 - 1)
    assert ratio[30] == pytest.approx(kept + (1 - kept) / 8, rel=1e-6)


@pytest.mark.parametrize("bias, norm", [("qkv", "none"), ("all", "per_head")])
def test_wide_heads_biases_and_norms_per_head_equal_float64(bias, norm):
    # 4 heads of 6 in a model of width 16; the scaling lowers some of the 3 frequencies 1, 0.22, 0.046.
    scaling = RopeScalingConfig(factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_length=100)
    fields = dict(head_dim=6, attention_bias=bias, attention_qk_norm=norm, rope_scaling=scaling)
    rng, params = np.random.default_rng(5), variables_of(**fields)["params"]
    params = jax.tree.map(lambda a: a + rng.normal(0, 0.3, a.shape).astype(np.float32), params)
    expected_names = {"w_query", "w_key", "w_value", "w_out", "query_bias", "key_bias", "value_bias"}
    expected_names |= {"output_bias"} if bias == "all" else set()
    expected_names |= {"query_norm", "key_norm"} if norm == "per_head" else set()
    assert set(params) == expected_names
    assert params["w_out"].shape == (24, 16)
    x = inputs(7)
    y = run(Attention(config(**fields)), {"params": params}, x, train=False)
    chex.assert_trees_all_close(y, attention64(x, params, 4, 2, norm, scaling), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kv_heads, min_chunk", [(4, 32), (2, 32), (1, 2)], ids=["each", "grouped", "one, chunked"]
)
def test_equals_float64(kv_heads, min_chunk, monkeypatch):
    # 7 positions in 4 chunks are 2 + 2 + 2 + 1.
    monkeypatch.setattr(attention, "MIN_CHUNK", min_chunk)
    x = inputs(7)
    layer = Attention(config(num_kv_heads=kv_heads))
    variables = variables_of(kv_heads)
    y = run(layer, variables, x, train=False)
    chex.assert_trees_all_close(y, attention64(x, variables["params"], 4, kv_heads), rtol=1e-4, atol=1e-6)


@functools.cache
def normed_variables():
    """Draws the variables of an attention with norms, whose gains start at 1, at random."""
    params = dict(variables_of(attention_qk_norm="all_heads")["params"])
    rng = np.random.default_rng(3)
    for name in ("query_norm", "key_norm"):
        gain = rng.uniform(0.5, 1.5, params[name]["scale"].shape).astype(np.float32)
        params[name] = {"scale": jnp.asarray(gain)}
    return {"params": params}


def test_norms_of_queries_and_keys_equal_float64():
    x, variables = inputs(7), normed_variables()
    y = run(Attention(config(attention_qk_norm="all_heads")), variables, x, train=False)
    expected = attention64(x, variables["params"], 4, 2)
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-6)
    # Without the norms the result would be far from it.
    plain = {name: w for name, w in variables["params"].items() if not name.endswith("norm")}
    assert np.abs(attention64(x, plain, 4, 2) - expected).max() > 0.1


def test_norms_run_over_all_heads_at_once():
    # 4 query heads and 2 of keys, each 4 wide: gains of 16 and 8, and none without the norms.
    shapes = jax.tree.map(jnp.shape, variables_of(attention_qk_norm="all_heads")["params"])
    assert shapes["query_norm"] == {"scale": (16,)} and shapes["key_norm"] == {"scale": (8,)}
    assert set(variables_of()["params"]) == {"w_query", "w_key", "w_value", "w_out"}
    # At position 0, where nothing is turned, with gains of 1, the mean square over all heads is 1.
    layer, variables = (
        Attention(config(attention_qk_norm="all_heads")),
        variables_of(attention_qk_norm="all_heads"),
    )
    q, k, _ = run(layer, variables, inputs(1), jnp.zeros(1, jnp.int32), method="heads")
    for turned in (np.asarray(q), np.asarray(k)):
        chex.assert_trees_all_close((turned**2).mean(axis=(1, 2, 3)), 1.0, rtol=1e-3)
        assert np.abs((turned**2).mean(axis=-1) - 1).max() > 0.1  # but not that of a head


def test_norms_ignore_the_length_of_a_token_in_its_scores():
    # Queries and keys of 3·x are those of x, up to eps; the values are three times as large.
    layer, variables, x = Attention(config(attention_qk_norm="all_heads")), normed_variables(), 10 * inputs(6)
    y, z = (run(layer, variables, a, train=False) for a in (x, 3 * x))
    chex.assert_trees_all_close(z, 3 * np.asarray(y), rtol=1e-3, atol=1e-4)


def test_later_tokens_do_not_matter():
    layer = Attention(config())
    x = inputs(70)
    variables = variables_of()
    y = run(layer, variables, x, train=False)
    changed = x.copy()
    changed[:, 40:] += 1.0
    z = run(layer, variables, changed, train=False)
    y, z = np.asarray(y), np.asarray(z)
    chex.assert_trees_all_equal(y[:, :40], z[:, :40])
    assert np.all(np.abs(y[:, 40:] - z[:, 40:]).max(axis=-1) > 1e-4)


def after_cached(layer, variables, x, cache, lengths, used, counts, visible):
    """Applies the layer to tokens that follow on a cache; returns output, cache and visible positions."""
    chunk, visible = next_chunk(visible, lengths, used, counts, x.shape[1])
    y, left = layer.apply(variables | {"cache": cache}, x, train=False, chunk=chunk, mutable=["cache"])
    return y, left["cache"], visible


def test_one_token_at_a_time_equals_the_whole():
    layer, x, size = Attention(config()), inputs(5), 8
    variables = variables_of()
    whole = run(layer, variables, x, train=False)
    step = jax.jit(functools.partial(after_cached, layer, variables))
    # Whatever lies in the cache beyond the tokens must not matter.
    cache = {name: jnp.full((2 * 2, size, 4), 9.0, jnp.float32) for name in ("keys", "values")}
    visible, counts = jnp.zeros((2, size), bool), jnp.ones((2,), jnp.int32)
    for s in range(5):
        lengths = jnp.full((2,), s, jnp.int32)
        y, cache, visible = step(x[:, s : s + 1], cache, lengths, jnp.int32(s), counts, visible)
        chex.assert_trees_all_close(y, whole[:, s : s + 1], rtol=1e-4, atol=1e-6)


def test_a_query_without_keys_stays_finite():
    # The padding of a sequence that has no token at all gets the mean of what the cache holds.
    layer, x = Attention(config()), inputs(3)
    variables = variables_of()
    cache = {name: jnp.zeros((2 * 2, 3, 4), jnp.float32) for name in ("keys", "values")}
    nothing = jnp.zeros((2,), jnp.int32)
    y, cache, _ = after_cached(
        layer, variables, x, cache, nothing, jnp.int32(0), nothing, jnp.zeros((2, 3), bool)
    )
    mean = np.asarray(cache["values"]).reshape(2, 2, 3, 4).mean(axis=2, keepdims=True)
    mean = np.repeat(mean, 2, axis=1).reshape(2, 1, 16)  # each of two heads is read by two of queries
    chex.assert_trees_all_close(
        y, np.repeat(mean @ np.asarray(variables["params"]["w_out"]), 3, axis=1), rtol=1e-4, atol=1e-6
    )


def test_gradient_equals_finite_differences():
    layer, x = Attention(config()), inputs(6, batch=1)
    variables = variables_of()
    step = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    loss = jax.jit(lambda x: jnp.sum(jnp.sin(3 * layer.apply(variables, x, train=False))))
    slope = float(np.sum(np.asarray(jax.jit(jax.grad(loss))(x)) * step))
    assert slope == pytest.approx(
        (float(loss(x + 1e-2 * step)) - float(loss(x - 1e-2 * step))) / 2e-2, rel=1e-2
    )


def test_dropout_acts_only_in_training_and_keeps_the_mean():
    layer, x = Attention(config(dropout=0.25)), inputs(6, batch=1)
    variables = variables_of()
    still = np.asarray(run(layer, variables, x, train=False))
    chex.assert_trees_all_equal(still, run(Attention(config()), variables, x, train=True))

    def dropped(key):
        return layer.apply(variables, x, train=True, rngs={"dropout": key})

    samples = np.asarray(jax.jit(jax.vmap(dropped))(jax.random.split(jax.random.key(1), 4000)))
    assert samples.std(axis=0).min() > 1e-3
    error = np.abs(np.mean(samples, axis=0) - still) / (np.std(samples, axis=0) / np.sqrt(4000))
    assert error.max() < 5


def test_computes_in_bfloat16_on_float32_parameters():
    x = inputs(6)
    variables = variables_of()
    y = run(Attention(config(dtype="bfloat16")), variables, x, train=False)
    chex.assert_type(y, jnp.bfloat16)
    assert {w.dtype.name for w in jax.tree.leaves(variables)} == {"float32"}
    chex.assert_trees_all_close(
        y.astype(np.float32), run(Attention(config()), variables, x, train=False), rtol=1e-7, atol=0.02
    )
