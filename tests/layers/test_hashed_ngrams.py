"""Engram's addresser and readout against their definition, and what their configs refuse."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import engram_oracle as oracle
from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite, memory_of
from ultramem_jax.errors import UserError
from ultramem_jax.layers import Memory
from ultramem_jax.models import Transformer
from ultramem_jax.presets import families

SMALL = dict(heads_per_order=3, rows_per_head=(97, 151), value_dim=4, conv_width=4)
EPS = float(np.finfo(np.float32).eps)


def made(memory, index=1, seed=0, vocab=120):
    """The second of two memories, with random variables, tokens and hidden states."""
    site = MemorySite.alone(memory, 24, index=index, num_memories=2, vocab_size=vocab)
    rng, module = np.random.default_rng(seed), Memory(site)
    x = rng.normal(size=(2, 11, 24)).astype(np.float32)
    tokens = rng.integers(0, vocab, (2, 11)).astype(np.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False, token_ids=tokens))
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.5 + 0.1, jnp.float32)  # noqa: E731
    variables = jax.tree.map(draw, {name: shapes[name] for name in ("params", "memory")})
    if "buffers" in shapes:
        number = memory.value_of("num_canonical_ids")
        variables["buffers"] = {"canonical_ids": jnp.asarray(rng.integers(0, number, vocab), jnp.int32)}
    return module, variables, x, tokens


def applied(module, variables, x, tokens):
    def apply(variables, x, tokens):
        return module.apply(variables, x, train=False, token_ids=tokens, mutable=["reads", "metrics"])

    return jax.jit(apply)(variables, x, tokens)


@pytest.mark.parametrize(
    ("fields", "order"),
    [({}, 3), (dict(num_canonical_ids=90, pad_id=2, seed=7), 3), (dict(rows_per_head=(64,)), 2), ({}, 5)],
)
def test_equals_the_definition_in_float64(fields, order):
    rows = fields.get("rows_per_head", (97, 151, 83, 211)[: order - 1])
    memory = families.engram(order, **SMALL | fields | dict(rows_per_head=rows))
    module, variables, x, tokens = made(memory)
    y, sown = applied(module, variables, x, tokens)
    ids, pad = tokens, memory.value_of("pad_id")
    if "buffers" in variables:
        canonical = np.asarray(variables["buffers"]["canonical_ids"])
        ids, pad = canonical[tokens], canonical[pad]
    factors = oracle.multipliers(
        memory.value_of("seed"), 2, memory.value_of("num_canonical_ids") or 120, order
    )
    sizes = oracle.table_sizes(rows, 3, 2)[1]
    slots = oracle.slots(ids, pad, factors, sizes, 3)
    chex.assert_trees_all_equal(np.asarray(sown["reads"]["slots"]).reshape(slots.shape), slots)
    chex.assert_shape(variables["memory"]["values"], (sum(sizes), 4))
    expected = oracle.layer(variables["params"], variables["memory"]["values"], slots, x, order, EPS, 1e-5)
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-5 * expected.std())


def test_the_convolution_starts_at_zero_and_gains_at_one():
    module, _, x, tokens = made(families.engram(**SMALL))
    params = module.init(jax.random.key(0), x, train=False, token_ids=tokens)["params"]
    assert not params["conv"].any() and not params["value_bias"].any() and not params["key_bias"].any()
    assert all((params[name] == 1).all() for name in ("gate_key_scale", "gate_hidden_scale", "conv_scale"))


@pytest.mark.parametrize("layers", [2, 8])
def test_the_output_starts_with_a_variance_of_half_a_layer(layers):
    memory = families.engram(heads_per_order=8, rows_per_head=(5000,), value_dim=16)
    module = Memory(MemorySite.alone(memory, 64, num_layers=layers))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 64, 64)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 257, (4, 64)), jnp.int32)
    y, _ = jax.jit(lambda: module.init_with_output(jax.random.key(1), x, train=False, token_ids=tokens))()
    assert float(y.var()) * 2 * layers == pytest.approx(1, rel=0.25)


def test_a_row_for_each_token_is_a_per_layer_embedding():
    memory = families.per_layer_embedding(value_dim=6)
    module, variables, x, tokens = made(memory)
    _, sown = applied(module, variables, x, tokens)
    chex.assert_shape(variables["memory"]["values"], (120, 6))
    chex.assert_trees_all_equal(sown["reads"]["slots"], tokens.reshape(-1, 1))
    mapped = memory.changed(num_canonical_ids=40)
    module, variables, x, tokens = made(mapped)
    _, sown = applied(module, variables, x, tokens)
    chex.assert_shape(variables["memory"]["values"], (40, 6))
    expected = np.asarray(variables["buffers"]["canonical_ids"])[tokens].reshape(-1, 1)
    chex.assert_trees_all_equal(sown["reads"]["slots"], expected)


def test_an_exact_table_needs_no_seed_of_its_own():
    exact, hashed = families.per_layer_embedding(), families.engram()
    assert len(ModelConfig(memories={"a": hashed, "b": exact}).sites) == 2
    assert len(ModelConfig(memories={"a": exact, "b": hashed, "c": exact}).sites) == 3


def test_it_adds_to_the_residual_stream_before_attention():
    plain = ModelConfig(vocab_size=31, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, mlp_dim=16)
    memory = families.engram(**SMALL | dict(placement="before@1"))
    model, tokens = replace(plain, memories={"engram": memory}), np.arange(10, dtype=np.int32).reshape(2, 5)
    variables = jax.jit(lambda: Transformer(model).init(jax.random.key(0), tokens))()
    held = {name: variables[name] for name in ("params", "memory")}
    logits = Transformer(model).apply(held, tokens)
    # The same as a plain model whose embedded tokens have the memory's output added.
    embedded = held["params"]["embedding"][tokens]
    own = {"params": held["params"]["engram_0"], "memory": held["memory"]["engram_0"]}
    added = embedded + Memory(model.sites[0]).apply(own, embedded, train=False, token_ids=tokens)
    params = {name: value for name, value in held["params"].items() if name != "engram_0"}
    rows = jnp.concatenate([added.reshape(10, 16), params["embedding"][10:]])
    untied = replace(plain, tie_embeddings=False)
    params |= {"embedding": rows, "output": held["params"]["embedding"].T}
    expected = Transformer(untied).apply({"params": params}, tokens)
    chex.assert_trees_all_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_without_token_ids_it_says_so():
    module, variables, x, _ = made(families.engram(**SMALL))
    with pytest.raises(UserError, match="token_ids: must be given"):
        module.apply(variables, x, train=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: families.engram(max_order=1), "max_order = 1: must be at least min_order = 2"),
        (lambda: families.engram(rows_per_head=(5, 7, 11)), "rows_per_head = .*one for each of the 2 orders"),
        (lambda: families.engram(rows_per_head=(1,)), r"rows_per_head = \(1,\): must be in \[2, "),
        (lambda: families.engram(rows_per_head=7), "rows_per_head = 7: must be a tuple"),
        (lambda: families.per_layer_embedding(rows_per_head=(9,)), "rows_per_head = .*must be left out"),
        (
            lambda: ModelConfig(memories={"a": families.engram(), "b": families.engram(max_order=2)}),
            r"model\.memories\.a\.address\.seed = 0: must differ from that of another n-gram memory",
        ),
        (lambda: families.per_layer_embedding().resized(10), "exact = True: must be False for a table"),
        (lambda: families.engram(exact=True), "exact = True: must be False unless max_order"),
        (lambda: families.engram(sharing="all"), "table.sharing = 'all': must be 'none'"),
        (lambda: families.engram(conv_width=1000), "conv_width = 1000: must be at most 256"),
        (lambda: families.engram(conv_dilation=0), "conv_dilation = 0: must be at least 1"),
        (
            lambda: ModelConfig(memories={"engram": families.engram(pad_id=257)}),
            r"model\.memories\.engram\.address\.pad_id = 257: must be a token: below 257",
        ),
        (
            lambda: ModelConfig(memories={"engram": families.engram(rows_per_head=(2**27,))}),
            "rows_per_head = .*a table of 2,147,",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_parts_of_a_memory_have_no_name_twice():
    keys = memory_of("product_keys", "context_gate", placement="before@1", num_keys=8, top_m=4)
    site = MemorySite.alone(keys, 16)
    assert {"key_scale", "gate_key_scale"} <= set(site.parameters)  # a gain of the keys, and of the gate
    module, x = Memory(site), jnp.ones((1, 3, 16))
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))["params"]
    assert {name: parameter.shape for name, parameter in site.parameters.items()} == jax.tree.map(
        jnp.shape, made
    )


def test_what_is_summed_or_weighed_is_counted():
    plain = MemorySite.alone(families.engram(**SMALL), 24)
    assert plain.lookup_flops == 0
    summed = memory_of("hashed_ngrams", sum_blocks=True, heads_per_order=3, rows_per_head=(97,), value_dim=4)
    assert MemorySite.alone(summed, 24).lookup_flops == 2 * 6 * 4
    weighed = families.engram(**SMALL, pre_value_dim=2)
    assert MemorySite.alone(weighed, 24).lookup_flops == 2 * 6 * (4 + 2)
