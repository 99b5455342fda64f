"""The optimizers of dense parameters, and runs with every rule of rows."""

import functools
import shutil
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.support.mesh_step import MEMORY, TRAIN, run, run_config, start
from ultramem_jax.accounting import bytes_per_token, count_parameters, optimizer_bytes
from ultramem_jax.config import MeshConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig
from ultramem_jax.ops.on_mesh import on_mesh
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes
from ultramem_jax.parallel.mesh import one_device as alone
from ultramem_jax.parallel.rules import LOGICAL_AXES
from ultramem_jax.presets import families
from ultramem_jax.training import undo_log
from ultramem_jax.training.dense_optimizer import make_optimizers, muon_matrices
from ultramem_jax.training.loop import train
from ultramem_jax.training.restore import load_model
from ultramem_jax.training.state import abstract_state

MODEL = ModelConfig(vocab_size=11, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=24)
MOE = replace(MODEL, tie_embeddings=False, moe=MoEConfig(num_experts=4, expert_dim=8, activation="swiglu"))
OF_MEMORY = dict(num_keys=4, top_m=4, num_heads=2, key_dim=8, value_dim=8)
MODELS = {
    "mlp": MODEL,
    "experts": MOE,
    "ultramem": replace(MODEL, memories={"memory": families.ultramem(**OF_MEMORY, placement="1:1")}),
    "gate": replace(MODEL, memories={"memory": families.memory_plus(**OF_MEMORY, placement="1:1")}),
    "pre-values": replace(
        MODEL,
        memories={
            "memory": families.ultramem_v2(**OF_MEMORY | {"num_heads": 1}, placement="1:1", pre_value_dim=4)
        },
    ),
}


def _abstract(model, optimizer, **fields):
    config = RunConfig(model, train=TrainConfig(optimizer=optimizer, **fields))
    with on_mesh(None):
        return config, abstract_state(config, make_optimizers(config), alone())


# ---- Muon and Lion


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_that_accounting_counts(name):
    model = MODELS[name]
    matrices = 0
    for optimizer in ("adamw", "muon", "lion"):
        config, state = _abstract(model, optimizer)
        kept = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        constants = 3 * 4 if optimizer == "muon" else 0  # coefficients of Newton and Schulz
        rows = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.table_state))
        found = sum(leaf.size * 4 for leaf in kept) - constants
        assert optimizer_bytes(model, config.train) == found + rows
        every = 10**6  # tokens, which read all rows and experts
        assert bytes_per_token(model, every, train=config.train).optimizer == found + rows
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            names = tuple(key.key for key in path)
            if optimizer == "muon" and {names[-1:], names[-2:]} & muon_matrices(model):
                matrices += leaf.size
    assert matrices == count_parameters(model).matrices


def test_every_parameter_is_a_matrix_or_known_not_to_be():
    names = {name.split("/")[-1] for name in LOGICAL_AXES}
    matrices, others = {name for (name,) in muon_matrices(MODEL)}, {"embedding", "output", "scale"}
    others |= {f"{of}_bias" for of in ("query", "key", "value", "output")} | {"lora_a", "lora_b"}
    assert names == matrices | others and not matrices & others
    of_memory = {names[-1] for names in muon_matrices(MODELS["pre-values"]) if len(names) == 2}
    assert of_memory == {"query", "pre_projection", "projection"}


def _updates(optimizer, decay=0.0):
    """Parameters of a model with experts, gradients, and the first update of them at a rate of 0.01."""
    constant = dict(steps=10, learning_rate=0.01, warmup_fraction=0.0, final_lr_fraction=1.0)
    train_config = TrainConfig(optimizer=optimizer, weight_decay=decay, clip_norm=0.0, **constant)
    config, state = _abstract(MOE, optimizer)
    rng = np.random.default_rng(0)
    params, gradients = (
        jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), state.params)
        for _ in range(2)
    )
    transformation = make_optimizers(replace(config, train=train_config)).params
    updates, _ = jax.jit(transformation.update)(gradients, transformation.init(params), params)
    return params, gradients, updates


def test_muon_makes_each_matrix_nearly_orthogonal_and_leaves_the_rest_to_adamw():
    _, _, updates = _updates("muon")
    _, _, adamw = _updates("adamw")
    layer = updates["layer_1"]
    chex.assert_shape(layer["feed_forward"]["w_in"], (4, 16, 8))
    for matrix in (layer["attention"]["w_query"], *layer["feed_forward"]["w_in"]):
        # At a root mean square of 0.2 all singular values of (a, b) are 0.2·sqrt(max(a, b)).
        values = np.linalg.svd(matrix, compute_uv=False) / (0.01 * 0.2 * max(matrix.shape) ** 0.5)
        assert values.min() > 0.5 and values.max() < 1.5
        assert (np.asarray(matrix) ** 2).mean() ** 0.5 == pytest.approx(0.01 * 0.2, rel=0.5)
    for name in ("embedding", "output"):
        chex.assert_trees_all_close(updates[name], adamw[name], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_weights_decay_alike_and_gains_do_not(optimizer):
    params, _, plain = _updates(optimizer)
    _, _, decayed = _updates(optimizer, decay=0.5)
    for p, a, b in zip(*map(jax.tree.leaves, (params, plain, decayed)), strict=True):
        lost = 0.01 * 0.5 * p if p.ndim > 1 else 0 * p
        chex.assert_trees_all_close(np.asarray(a) - b, lost, rtol=1e-4, atol=1e-6)


def test_lion_takes_steps_of_its_learning_rate():
    _, gradients, updates = _updates("lion")
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.01 * np.sign(g), gradients), rtol=1e-5)


ON_MESH = MeshConfig(data=1, fsdp=2, tensor=2, memory=2)


@functools.cache
def _on_mesh(optimizer):
    config = run_config(MEMORY, ON_MESH, replace(TRAIN, optimizer=optimizer, final_lr_fraction=1.0))
    model = replace(config.model, moe=MoEConfig(num_experts=4, expert_dim=8))
    return replace(config, model=model)


def test_muon_on_a_mesh_trains_as_on_one_device():
    config = _on_mesh("muon")
    state, losses, _ = run(config, 2)
    expected, expected_losses, _ = run(replace(config, mesh=MeshConfig()), 2, alone=True)
    chex.assert_trees_all_close(losses, expected_losses, rtol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        # A direction that has next to no gradient may be turned by the order of a sum.
        assert np.isclose(ours, theirs, rtol=1e-3, atol=1e-4).mean() > 0.99


def test_lion_on_a_mesh_takes_steps_of_its_learning_rate():
    config = _on_mesh("lion")
    begin = start(replace(config.model, memories={"memory": MEMORY}), config.train).params
    state, _, _ = run(config, 1)
    for before, after in zip(jax.tree.leaves(begin), jax.tree.leaves(state.params), strict=True):
        moved = np.abs(np.asarray(after) - before * (1 - 0.01 * 0.1 * (before.ndim > 1)))
        assert ((np.abs(moved - 0.01) < 1e-5) | (moved < 1e-6)).all()  # not at all where the gradient is 0
        assert moved.max() > 0.009


@pytest.mark.parametrize("optimizer", ["muon", "lion"])
def test_moments_on_a_mesh_lie_as_their_parameters(optimizer):
    config = _on_mesh(optimizer)
    axes = mesh_axes(config, make_mesh(config.mesh))
    abstract = abstract_state(config, make_optimizers(config), axes)
    where = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)
    }
    assert where["['layer_1']['feed_forward']['w_in']"] == P("memory", "fsdp", "tensor")
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt_state):
        if isinstance(path[-1], jax.tree_util.DictKey):
            first = next(i for i, key in enumerate(path) if jax.tree_util.keystr(path[i:]) in where)
            assert leaf.sharding.spec == where[jax.tree_util.keystr(path[first:])]
            found += 1
        else:
            assert leaf.sharding.spec == P()
    assert found >= len(where)


# ---- rules of rows, in a run


RULES = {
    "adamw_catch_up": dict(optimizer="lion", row_second_moment="row", row_moment_dtype="bfloat16"),
    "adagrad": dict(row_moment_dtype="bfloat16"),
    "sgd": dict(optimizer="muon"),
    "adamw": dict(slots_per_step=3, slot_score="reads"),
}
"""Rules that keep numbers of each kind, one, and none, and one for some of the rows that a step reads."""


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_goes_on_ends_as_one_that_was_not_cut_off(rule, config, tmp_path, monkeypatch):
    monkeypatch.setattr(undo_log, "LIVE_BYTES", 0)  # tables are saved while steps write into them
    memory = config.model.memory.changed(dtype="bfloat16", placement="1:1")
    of_rule = replace(
        config.train, steps=3, grad_accumulation=1, checkpoint_every=1, row_optimizer=rule, **RULES[rule]
    )
    config = replace(
        config,
        model=replace(config.model, num_layers=1, dropout=0.0, memories={"memory": memory}),
        train=of_rule,
    )
    whole = train(config, tmp_path, progress=False)
    assert whole.finished
    chex.assert_tree_all_finite(whole.validation_loss)
    leaves = jax.tree.leaves(whole.state.table_state)
    assert len(leaves) == len(of_rule.row_arrays) and all(np.asarray(leaf).any() for leaf in leaves)
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    again = train(config, tmp_path, progress=False)
    assert jax.tree.structure(again.state) == jax.tree.structure(whole.state)
    chex.assert_trees_all_equal(again.state, whole.state)
    loaded = load_model(tmp_path)
    chex.assert_trees_all_equal(loaded.variables["memory"], whole.state.tables)
