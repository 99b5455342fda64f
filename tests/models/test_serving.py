"""`prepare_for_decoding` keeps the numbers of the model, and leaves no work that could be done before."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from tests.support.drawn import variables_of
from tests.support.systems import CONFIGS
from ultramem_jax.config import MeshConfig
from ultramem_jax.errors import UserError
from ultramem_jax.models import Transformer
from ultramem_jax.models.cache import cache_bytes, empty_cache
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.ops.linear import OutputMajor
from ultramem_jax.parallel.mesh import make_mesh
from ultramem_jax.platforms import targeting


def _config(name, **fields):
    config = replace(CONFIGS.get(name, CONFIGS["mlp"]), vocab_size=31, num_layers=2)
    if config.memory is not None:
        config = replace(config, memories={"memory": config.memory.changed(placement="1:2", **fields)})
    return config


@pytest.mark.parametrize("name", ["moe", "ultramem-v2"])
def test_prepared_variables_give_the_same_logits_without_a_cache_too(name):
    config = _config(name)
    variables = variables_of(config)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)
    apply = jax.jit(Transformer(config).apply)
    chex.assert_trees_all_close(
        apply(prepare_for_decoding(config, variables), tokens), apply(variables, tokens), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_experts_on_a_tpu_are_padded_and_give_the_same_logits(activation):
    config = _config("moe")
    config = replace(config, moe=replace(config.moe, expert_dim=12, activation=activation))
    variables = variables_of(config)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)
    with targeting("tpu"):
        served = prepare_for_decoding(config, variables)
        found = jax.jit(Transformer(config).apply)(served, tokens)
        assert prepare_for_decoding(config, served) is served
    experts, width = config.moe.num_experts, config.embed_dim
    of_layer = served["params"]["layer_1"]["feed_forward"]
    assert of_layer["w_in"].weights.shape == (experts, width, 128)
    assert of_layer["w_out"].weights.shape == (experts, 128, width)
    expected = jax.jit(Transformer(config).apply)(variables, tokens)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-5)


def test_bfloat16_reads_half_the_bytes_and_keeps_what_must_be_float32():
    config = replace(_config("ultramem"), dtype="bfloat16")
    variables = variables_of(config)
    served = prepare_for_decoding(config, variables)
    params = served["params"]
    chex.assert_type(params["layer_1"]["feed_forward"]["w_in"].rows, jnp.bfloat16)
    chex.assert_type(params["memory_0"]["keys"].matrices[0][0][0].rows, jnp.bfloat16)
    chex.assert_type([params["memory_0"]["cores"], params["final_norm"]["scale"]], jnp.float32)
    # The tied embedding is there once, and the table is the one that was given.
    assert params["output"].rows is params["embedding"]
    assert served["memory"]["memory_0"]["values"] is variables["memory"]["memory_0"]["values"]
    exact = jax.jit(Transformer(config).apply)
    tokens = np.arange(6, dtype=np.int32)[None]
    found, expected = exact(served, tokens), exact(variables, tokens)
    assert jnp.abs(found - expected).mean() < 0.05 * jnp.abs(expected).mean()


def test_what_is_prepared_comes_back_as_it_is():
    config = _config("moe")
    served = prepare_for_decoding(config, variables_of(config))
    assert prepare_for_decoding(config, served) is served
    of_experts = served["params"]["layer_1"]["feed_forward"]["w_in"]
    assert len(of_experts) == 6 and all(isinstance(w, OutputMajor) for w in of_experts)


def test_variables_on_a_mesh_are_refused():
    config = _config("mlp")
    everywhere = NamedSharding(make_mesh(MeshConfig(data=2), jax.devices()[:2]), PartitionSpec())
    with pytest.raises(UserError, match="variables = 'on 2 devices': must be on one"):
        prepare_for_decoding(config, jax.device_put(variables_of(config), everywhere))


def _step(config, variables, batch=3):
    """Returns the jaxpr of a decoding step."""
    cache = empty_cache(config, batch, 8)
    apply = Transformer(config).apply
    tokens, counts = jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch,), jnp.int32)

    def step(variables, tokens):
        return apply(variables | {"cache": cache}, tokens, counts=counts, mutable=["cache"])

    return jax.make_jaxpr(step)(variables, tokens)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


@pytest.mark.parametrize("name", ["pkm", "memory-plus", "ultramem", "ultramem-v2"])
def test_a_step_computes_nothing_that_depends_only_on_parameters(name):
    config = _config(name, num_keys=64, top_m=2, key_dim=64)
    served = prepare_for_decoding(config, variables_of(config))
    of_memory = served["params"]["memory_0"]["keys"].matrices
    equations = list(_equations(_step(config, served).jaxpr))
    assert not any("svd" in equation.primitive.name for equation in equations)
    made = [v.aval.size for e in equations for v in e.outvars if not e.primitive.name.startswith("pjit")]
    # Not one side's keys of a head and rank in any other form, let alone a table.
    assert max(made) < min(w.rows.size for side in of_memory for each in side for w in each)


@pytest.mark.parametrize("name", ["pkm", "ultramem", "ultramem-v2"])
def test_more_slots_let_only_the_scores_of_their_keys_grow(name):
    # With sixteen times the slots, what grows grows as the keys of a side do.
    few, many = (_step_shapes(_config(name, num_keys=n)) for n in (32, 128))
    grown = [(a, b) for a, b in zip(few, many, strict=True) if a != b]
    for a, b in grown:
        assert np.prod(b) <= 4 * np.prod(a), (a, b)


def _step_shapes(config):
    served = jax.eval_shape(lambda: prepare_for_decoding(config, _abstract(config)))
    return [v.aval.shape for e in _equations(_step(config, served).jaxpr) for v in e.outvars]


def _abstract(config):
    made = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return {k: made[k] for k in ("params", "memory", "buffers") if k in made}


def test_the_cache_takes_the_bytes_that_it_says():
    config = replace(_config("ultramem"), dtype="bfloat16")
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        keys_and_values = 2 * config.num_layers * 5 * config.num_kv_heads * 24 * 8 * size
        inputs = 5 * (config.memory.address.query_conv_width - 1) * 16 * 2
        expected = keys_and_values + inputs + 5 * 24 + 5 * 4 + 4
        assert cache_bytes(config, 5, 24, dtype) == expected
    chex.assert_tree_all_finite(empty_cache(config, 5, 24))
