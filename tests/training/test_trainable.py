"""Frozen parameters stay to the bit and have no state; the others learn as in a whole training."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import mesh_step
from tests.support.drawn import drawn_state, variables_of
from tests.support.step_models import FAMILY, MODEL, ULTRAMEM, token_batches
from ultramem_jax.config import MoEConfig, RunConfig, TrainConfig
from ultramem_jax.errors import UserError
from ultramem_jax.models import Transformer
from ultramem_jax.parallel.mesh import one_device
from ultramem_jax.presets import families
from ultramem_jax.training import lora, trainable
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.initial import Initial, with_zero_outputs
from ultramem_jax.training.state import abstract_state, fresh_state, model_variables, state_of
from ultramem_jax.training.step import language_model_objective, make_train_step

TRAIN = TrainConfig(steps=6, batch_size=8, learning_rate=1e-2, warmup_fraction=0.0)
V2 = replace(MODEL, memories={"memory": FAMILY["ultramem-v2"]})
LORA = dict(lora_rank=2, lora_alpha=6.0, lora_targets="w_(query|in)$", trainable="lora/")


def names(tree):
    return set(trainable.names(tree))


def changed(before, after):
    """Names of the leaves of two nested dicts that differ in any bit."""
    flat = [dict(zip(trainable.names(tree), jax.tree.leaves(tree), strict=True)) for tree in (before, after)]
    assert flat[0].keys() == flat[1].keys()
    return {
        name for name in flat[0] if np.asarray(flat[0][name]).tobytes() != np.asarray(flat[1][name]).tobytes()
    }


@functools.cache
def steps_of(model, train, count):
    """The state before and after some steps, on the host, and the last metrics."""
    config = RunConfig(model, train=train)
    step = jax.jit(make_train_step(config, make_optimizers(config)), donate_argnums=0)
    state = drawn_state(config)
    before = jax.tree.map(np.asarray, state)
    for tokens in token_batches(count):
        state, metrics = step(state, tokens)
    return before, jax.tree.map(np.asarray, state), metrics


def test_selecting_and_overlaying():
    tree = {"layer_1": {"a": {"w": 1}, "b": 2}, "layer_10": {"b": 3}, "scale": 4}
    assert trainable.selected(tree, "") == tree
    assert trainable.selected(tree, "layer_1/") == {"layer_1": tree["layer_1"]}
    assert trainable.selected(tree, "b$|a/w") == {"layer_1": {"a": {"w": 1}, "b": 2}, "layer_10": {"b": 3}}
    assert trainable.selected(tree, "nothing") == {}
    part = {"layer_1": {"a": {"w": 5}}, "new": {"x": 6}}
    expected = {"layer_1": {"a": {"w": 5}, "b": 2}, "layer_10": {"b": 3}, "scale": 4, "new": {"x": 6}}
    assert trainable.overlaid(tree, part) == expected
    assert trainable.names(tree) == ["layer_1/a/w", "layer_1/b", "layer_10/b", "scale"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_dense_parameters_that_match_learn(optimizer):
    train = replace(TRAIN, trainable="layer_2/attention/", optimizer=optimizer)
    before, after, metrics = steps_of(ULTRAMEM, train, 3)
    matching = {name for name in names(before.params) if name.startswith("layer_2/attention/")}
    assert len(matching) == 4 and changed(before.params, after.params) == matching
    assert not changed(before.tables, after.tables)
    # Two moments of each under AdamW, one under Muon; no other array is kept but constants and counters.
    moments = [a.shape for a in jax.tree.leaves(before.opt_state) if a.ndim > 1]
    assert sorted(moments) == (2 if optimizer == "adamw" else 1) * 4 * [(16, 16)]
    assert not jax.tree.leaves(before.table_state)
    # Usage of the slots is recorded all the same.
    assert float(metrics["memory_0/slots_read_share"]) > 0 and float(metrics["memory_0/row_norm"]) == 0
    assert all(of.seen.any() for of in after.usage.values())


def test_tables_alone_learn_as_in_a_whole_training():
    alone = replace(TRAIN, trainable="^memory_[01]/values$")
    before, after, metrics = steps_of(ULTRAMEM, alone, 1)
    assert not changed(before.params, after.params)
    assert not [a for a in jax.tree.leaves(after.opt_state) if a.ndim]
    assert changed(before.tables, after.tables) == {"memory_0/values", "memory_1/values"}
    # The first step's gradient of the rows does not depend on what else learns. 2048 reads of 16 slots read
    # every row, so the dense way agrees, too.
    _, whole, of_whole = steps_of(ULTRAMEM, TRAIN, 1)
    _, dense, _ = steps_of(ULTRAMEM, replace(alone, table_gradient="dense"), 1)
    chex.assert_trees_all_close(after.tables, whole.tables, rtol=1e-6, atol=1e-8)
    chex.assert_trees_all_close(after.tables, dense.tables, rtol=1e-4, atol=1e-6)
    assert not changed(before.params, dense.params)
    assert float(metrics["gradient_norm"]) == 0
    assert float(metrics["loss"]) == pytest.approx(float(of_whole["loss"]), rel=1e-6)


def test_one_array_of_a_table_may_learn():
    before, after, _ = steps_of(V2, replace(TRAIN, trainable="memory_tables/pre_values|final_norm"), 2)
    assert changed(before.tables, after.tables) == {"memory_tables/pre_values"}
    assert set(before.table_state["memory_tables"]) == {"pre_values"}
    assert changed(before.params, after.params) == {"final_norm/scale"}


def test_on_a_mesh_and_over_micro_batches():
    # The mesh has owners of rows and of columns; each micro-batch is split over devices.
    some = replace(mesh_step.MICRO_BATCHES.train, trainable="memory_tables/values|attention/")
    config = replace(mesh_step.MICRO_BATCHES, train=some)
    there, losses, _ = mesh_step.run(config, 2)
    before, alone, _ = steps_of_micro_batches(config)
    moved = {f"layer_{i}/attention/w_{w}" for i in (1, 2) for w in ("query", "key", "value", "out")}
    assert changed(before.params, there.params) == changed(before.params, alone.params) == moved
    assert changed(before.tables, there.tables) == {"memory_tables/values"}
    chex.assert_trees_all_close(there.params, alone.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(there.tables, alone.tables, rtol=1e-4, atol=1e-5)
    assert np.isfinite(losses).all()


def steps_of_micro_batches(config):
    start = jax.tree.map(np.asarray, mesh_step.start(config.model, config.train))
    state, losses, metrics = mesh_step.run(config, 2, alone=True)
    return start, state, (losses, metrics)


def test_patterns_that_are_refused():
    with pytest.raises(
        UserError, match=r"train\.trainable = 'attn': must match the name of a parameter, such"
    ):
        drawn_state(RunConfig(MODEL, train=replace(TRAIN, trainable="attn")))
    with pytest.raises(
        UserError, match=r"train\.trainable = '\(': must be a regular expression: .*at position 0"
    ):
        replace(TRAIN, trainable="(")
    with pytest.raises(UserError, match=r"lora_targets = 'norm': must match matrices of layers"):
        drawn_state(RunConfig(MODEL, train=replace(TRAIN, **LORA | dict(lora_targets="norm"))))
    experts = replace(MODEL, moe=MoEConfig(num_experts=2, expert_dim=8))
    with pytest.raises(UserError, match=r"lora_targets = 'feed_forward': must match matrices of layers"):
        drawn_state(RunConfig(experts, train=replace(TRAIN, **LORA | dict(lora_targets="feed_forward"))))
    with pytest.raises(
        UserError, match=r"trainable = '': must not match layer_1/attention/w_query, which LoRA"
    ):
        drawn_state(RunConfig(MODEL, train=replace(TRAIN, **LORA | dict(trainable=""))))
    with pytest.raises(UserError, match=r"train\.lora_rank = -1: must be at least 0"):
        replace(TRAIN, lora_rank=-1)
    with pytest.raises(UserError, match=r"trainable = 'norm': must match LoRA's factors, such as 'lora/'"):
        drawn_state(RunConfig(MODEL, train=replace(TRAIN, **LORA | dict(trainable="norm"))))
    some = replace(TRAIN, **LORA | dict(lora_targets="layer_1/attention"))
    scanned = RunConfig(replace(MODEL, scan_layers=True), train=some)
    with pytest.raises(
        UserError, match=r"model\.scan_layers = True: must be False while train\.lora_targets"
    ):
        jax.eval_shape(
            make_train_step(scanned, make_optimizers(scanned)), drawn_state(scanned), token_batches(1)[0]
        )


def with_random_factors(state):
    """The state with random numbers in both factors."""
    rng = np.random.default_rng(4)
    factors = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 4, a.dtype), state.params["lora"])
    return state.replace(params=state.params | {"lora": factors})


@functools.cache
def lora_case():
    config = RunConfig(MODEL, train=replace(TRAIN, **LORA))
    return config, drawn_state(config)


def test_factors_start_at_the_model_and_are_merged_exactly():
    config, state = lora_case()
    assert names(state.params["lora"]) == {
        f"layer_{i}/{matrix}/lora_{of}"
        for i in (1, 2)
        for matrix in ("attention/w_query", "feed_forward/w_in")
        for of in "ab"
    }
    a = state.params["lora"]["layer_1"]["feed_forward"]["w_in"]["lora_a"]
    assert a.shape == (16, 2) and 0.15 < float(jnp.std(a)) < 0.35  # 1/√16
    plain = {"params": {name: of for name, of in state.params.items() if name != "lora"}}
    tokens = token_batches(1)[0][:, :-1]
    apply = jax.jit(lambda params: Transformer(MODEL).apply({"params": params}, tokens))
    base = apply(plain["params"])
    chex.assert_trees_all_equal(apply(lora.adapted(state.params, config.train)), base)

    moved = with_random_factors(state)
    whole = lora.merged(model_variables(moved), config.train)
    assert names(whole["params"]) == names(plain["params"])
    for matrix in ("attention/w_query", "feed_forward/w_in"):
        module, name = matrix.split("/")
        pair = moved.params["lora"]["layer_2"][module][name]
        a, b = (np.asarray(pair[of], np.float64) for of in ("lora_a", "lora_b"))
        expected = np.asarray(plain["params"]["layer_2"][module][name], np.float64) + 6 / 2 * a @ b
        chex.assert_trees_all_close(whole["params"]["layer_2"][module][name], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        apply(lora.adapted(moved.params, config.train)), apply(whole["params"]), rtol=1e-4, atol=1e-5
    )
    assert float(jnp.abs(apply(whole["params"]) - base).max()) > 0.1


@pytest.mark.parametrize("scan", [False, True])
def test_gradients_of_the_factors_are_those_of_the_definition(scan):
    config, state = lora_case()
    state = with_random_factors(state)
    config = replace(config, model=replace(MODEL, scan_layers=scan))
    plain = {name: of for name, of in state.params.items() if name != "lora"}
    tokens, key = token_batches(1)[0], jax.random.key(0)
    objective = language_model_objective(config)
    of_plain = language_model_objective(RunConfig(MODEL, train=TRAIN))

    def adapted_loss(factors):
        return objective.loss({"params": plain | {"lora": factors}}, {}, tokens, key)[0]

    def defined_loss(factors):
        params = dict(plain)
        for layer, modules in factors.items():
            for module, matrices in modules.items():
                for name, pair in matrices.items():
                    weights = plain[layer][module][name] + 3.0 * pair["lora_a"] @ pair["lora_b"]
                    params = trainable.overlaid(params, {layer: {module: {name: weights}}})
        return of_plain.loss({"params": params}, {}, tokens, key)[0]

    found = jax.jit(jax.grad(adapted_loss))(state.params["lora"])
    expected = jax.jit(jax.grad(defined_loss))(state.params["lora"])
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(float(jnp.abs(g).max()) > 1e-4 for g in jax.tree.leaves(found))


def test_only_the_factors_learn():
    before, after, _ = steps_of(MODEL, replace(TRAIN, **LORA), 2)
    factors = {f"lora/{name}" for name in names(before.params["lora"])}
    assert changed(before.params, after.params) == factors


SMALL = dict(num_keys=4, top_m=4, num_heads=2, key_dim=8)
KINDS = {
    "ultramem": families.ultramem(placement="1:2", value_dim=8, **SMALL),
    "ultramem_v2": families.ultramem_v2(pre_value_dim=6, value_dim=8, **SMALL | dict(num_heads=1)),
    "pkm": families.pkm(placement="1:1", value_dim=16, **SMALL),
    "memory_plus": families.memory_plus(value_dim=8, **SMALL),
    "peer": families.peer(placement="2:2", value_dim=16, pre_value_dim=16, **SMALL),
    "engram": families.engram(
        placement="before@2", heads_per_order=2, rows_per_head=(31,), value_dim=4, num_canonical_ids=11
    ),
}


LAST = {
    **{kind: ({f"{kind}_0/projection"}, set()) for kind in ("ultramem", "ultramem_v2", "memory_plus")},
    **{kind: (set(), {f"{kind}_0/values"}) for kind in ("pkm", "peer")},
    "engram": ({"engram_0/value_projection", "engram_0/value_bias"}, set()),
}
"""Arrays that are zero at first: dense parameters, and those of tables."""


def grafted(kind):
    """A model with a memory that it did not have, and its state, whose layers are those without it."""
    model = replace(MODEL, memories={kind: KINDS[kind]})
    state = drawn_state(RunConfig(model, train=TRAIN))
    params = trainable.overlaid(state.params, variables_of(MODEL, 3)["params"])
    zeroed = with_zero_outputs(model, params, state.tables, [kind])
    return model, state.replace(params=zeroed[0], tables=zeroed[1])


@functools.cache
def logits_of(model):
    return jax.jit(Transformer(model).apply)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grafted_memory_adds_nothing_at_first(kind):
    tokens, (model, state) = token_batches(1)[0], grafted(kind)
    expected = logits_of(MODEL)(variables_of(MODEL, 3), tokens)
    found = logits_of(model)(model_variables(state), tokens)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    zeros = [
        {name for name, a in zip(trainable.names(tree), jax.tree.leaves(tree), strict=True) if not a.any()}
        for tree in (state.params, state.tables)
    ]
    dense, rows = LAST[kind]
    assert dense <= zeros[0] and rows == zeros[1]


@pytest.mark.parametrize("kind", ["ultramem", "peer", "engram"])
def test_a_grafted_memory_learns_from_its_last_factor_on(kind):
    model, state = grafted(kind)
    train = replace(TRAIN, weight_decay=0.0, trainable=f"^{kind}_0/")
    config = RunConfig(model, train=train)
    step = jax.jit(make_train_step(config, make_optimizers(config)))
    state = state_of(config, make_optimizers(config), model_variables(state), jnp.uint32(0))
    first, _ = step(state, token_batches(1)[0])
    second, _ = step(first, token_batches(1)[0])
    dense, rows = LAST[kind]
    assert dense <= changed(state.params, first.params)
    # Rows have no gradient through a zero, only those that are the factor themselves; then all have one.
    assert changed(state.tables, first.tables) == rows
    assert changed(first.tables, second.tables) == names(state.tables)
    assert not {name for name in changed(state.params, second.params) if not name.startswith(kind)}


def test_what_is_given_is_taken_and_the_rest_is_drawn():
    config = RunConfig(ULTRAMEM, train=TRAIN)
    optimizers, axes = make_optimizers(config), one_device()
    drawn = fresh_state(config, optimizers, axes, np.uint32(5))
    half = {
        "params": {"layer_1": jax.tree.map(lambda a: (a + 1).astype(jnp.bfloat16), drawn.params["layer_1"])}
    }
    state = fresh_state(config, optimizers, axes, np.uint32(5), initial=Initial(half))
    chex.assert_trees_all_equal(
        state.params["layer_1"], jax.tree.map(lambda a: a.astype(jnp.float32), half["params"]["layer_1"])
    )
    chex.assert_trees_all_equal(state.replace(params={}), drawn.replace(params={}))
    others = [{n: of for n, of in s.params.items() if n != "layer_1"} for s in (state, drawn)]
    chex.assert_trees_all_equal(*others)
    abstract = abstract_state(config, optimizers, axes)
    with pytest.raises(
        UserError, match=r"--init_from: params/final_norm/scale\.shape = \(3,\): must be \(16,\)"
    ):
        wrong = Initial({"params": {"final_norm": {"scale": jnp.ones(3)}}})
        fresh_state(config, optimizers, axes, np.uint32(0), abstract, wrong)
    with pytest.raises(
        UserError, match=r"--init_from has params/layer_9, which the model of this run does not"
    ):
        fresh_state(config, optimizers, axes, np.uint32(0), abstract, Initial({"params": {"layer_9": {}}}))
