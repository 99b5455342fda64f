"""Every layer keeps the promises that all layers make."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.decoding import assert_decodes, decoded
from tests.support.drawn import drawn_variables, variables_of
from tests.support.systems import CONFIGS
from ultramem_jax.layers import Attention, Memory, feed_forward
from ultramem_jax.models import Transformer
from ultramem_jax.models.serving import prepare_for_decoding

LAYERS = {"attention": Attention, "mlp": feed_forward, "moe": feed_forward, "moe-fine": feed_forward}


def layer(name, config):
    """The layer of a system, from the config of its model."""
    return LAYERS[name](config) if name in LAYERS else Memory(config.sites[0])


BY_TOKEN = sorted(set(CONFIGS) - {"attention", "ultramem"})
"""Layers that see one token at a time. Attention and the query convolution look back."""


@functools.cache
def _made(name, dtype="float32"):
    config = CONFIGS[name]
    module = layer(name, replace(config, dtype=dtype))
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    return module, drawn_variables(lambda: module.init(jax.random.key(0), x, train=False)), x


@functools.cache
def _compiled(name, dtype="float32"):
    module, _, _ = _made(name, dtype)
    return jax.jit(lambda variables, x: module.apply(variables, x, train=False))


@pytest.fixture(params=sorted(CONFIGS))
def name(request):
    return request.param


def test_jit_equals_eager_and_does_not_recompile(name):
    module, variables, x = _made(name)
    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(lambda v, x: module.apply(v, x, train=False), n=1))
    y = compiled(variables, x)
    chex.assert_equal_shape([y, x])
    chex.assert_type(y, jnp.float32)
    chex.assert_trees_all_close(y, module.apply(variables, x, train=False), rtol=1e-4, atol=1e-5)
    compiled(variables, x + 1)


def test_gradients_are_finite_and_reach_every_parameter(name):
    module, variables, x = _made(name)

    def loss(params, x):
        y, sown = module.apply(variables | {"params": params}, x, train=True, mutable=["losses"])
        return (y**2).sum() + sum(jax.tree.leaves(sown), jnp.zeros(()))

    grads, d_x = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], x)
    chex.assert_tree_all_finite((grads, d_x))
    for path, grad in jax.tree_util.tree_flatten_with_path((grads, d_x))[0]:
        assert grad.any(), path


def test_bfloat16_computation_keeps_float32_parameters(name):
    _, variables, x = _made(name, "bfloat16")
    assert {a.dtype for a in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
    y, exact = (_compiled(name, dtype)(variables, x) for dtype in ("bfloat16", "float32"))
    chex.assert_type(y, jnp.bfloat16)
    # Near ties may send a token elsewhere (another expert, another slot), so the bound is on the mean.
    assert jnp.abs(y.astype(jnp.float32) - exact).mean() < 0.05 * jnp.abs(exact).mean()


def test_a_sequence_gives_the_same_by_itself_and_in_a_batch(name):
    _, variables, x = _made(name)
    alone, together = (_compiled(name)(variables, a) for a in (x[:1], x))
    chex.assert_trees_all_close(alone, together[:1], rtol=1e-4, atol=1e-5)


def test_no_token_sees_what_comes_after_it(name):
    _, variables, x = _made(name)
    later = x.at[:, 4:].set(jax.random.normal(jax.random.key(5), (2, 2, 16)))
    before, after = (_compiled(name)(variables, a) for a in (x, later))
    chex.assert_trees_all_close(before[:, :4], after[:, :4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_token", BY_TOKEN)
def test_permuted_tokens_give_permuted_outputs(by_token):
    _, variables, x = _made(by_token)
    order = jnp.array([3, 0, 5, 1, 4, 2])
    permuted, y = (_compiled(by_token)(variables, a) for a in (x[:, order], x))
    chex.assert_trees_all_close(permuted, y[:, order], rtol=1e-4, atol=1e-5)


# ---- In a model that decodes

PLACEMENTS = {"in_turn": "1:1/3:3", "skipping": "1:2/1:3", "crossing": "1:3/2:2"}


@functools.cache
def _model(name, placement="skipping", dtype="float32", **fields):
    config = replace(CONFIGS[name], vocab_size=31, dtype=dtype, tie_embeddings=name != "moe")
    if config.memory is not None:
        memory = config.memory.changed(placement=PLACEMENTS[placement], **fields)
        config = replace(config, num_layers=3, memories={"memory": memory})
    variables = variables_of(config)
    tokens = np.random.default_rng(1).integers(0, 31, (2, 9)).astype(np.int32)
    full = jax.jit(Transformer(config).apply)(variables, tokens)
    return config, variables, tokens, np.asarray(full)


def test_decoding_by_a_cache_gives_what_the_whole_sequence_gives(name):
    config, variables, tokens, full = _model(name)
    assert_decodes(config, prepare_for_decoding(config, variables), tokens, full)


@pytest.mark.parametrize("plain", ["attention", "moe", "ultramem"])
def test_decoding_needs_no_preparation(plain):
    assert_decodes(*_model(plain))


@pytest.mark.parametrize("cached", ["attention", "mlp"])
def test_a_cache_in_bfloat16_rounds_keys_values_and_what_they_are_multiplied_with(cached):
    config, variables, tokens, full = _model(cached)
    for row, position, logits in decoded(config, variables, tokens, "bfloat16"):
        error = np.abs(logits - full[row, position]).max()
        # Eight bits of keys and values; far less than if positions were mistaken.
        assert 0 < error < 0.03 * np.abs(full[row, position]).max()


@pytest.mark.parametrize("computed", ["mlp", "pkm"])
def test_decoding_in_bfloat16_is_as_near_to_float32_as_the_whole_sequence(computed):
    _, variables, tokens, exact = _model(computed)
    config, _, _, full = _model(computed, dtype="bfloat16")
    found = decoded(config, prepare_for_decoding(config, variables), tokens)
    errors = [np.abs(logits - exact[row, position]).mean() for row, position, logits in found]
    assert np.median(errors) < 1.5 * np.abs(full - exact).mean()


@pytest.mark.parametrize(("placement", "taps"), [("in_turn", 5), ("crossing", 1), ("crossing", 0)])
def test_decoding_knows_every_placement_and_width_of_the_convolution(placement, taps):
    config, variables, tokens, full = _model("ultramem", placement, query_conv_width=taps)
    if taps:  # it starts as the identity
        for index in range(len(config.sites)):
            of_memory = variables["params"][f"memory_{index}"]
            of_memory["query_conv"] = jax.random.normal(jax.random.key(index), of_memory["query_conv"].shape)
        full = np.asarray(jax.jit(Transformer(config).apply)(variables, tokens))
    assert_decodes(config, prepare_for_decoding(config, variables), tokens, full)


@pytest.mark.parametrize("name", ["memory-plus", "ultramem-v2"])
def test_decoding_knows_tables_that_memories_share(name):
    sharing = {"memory-plus": dict(sharing="all"), "ultramem-v2": dict(sharing="ring")}[name]
    config, variables, tokens, full = _model(name, "in_turn", **sharing)
    assert_decodes(config, prepare_for_decoding(config, variables), tokens, full)
