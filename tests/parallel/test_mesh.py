"""Meshes and how parameters lie on them; what cannot be is refused before anything is compiled."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ultramem_jax import UserError
from ultramem_jax.config import (
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
    run_config_from_dict,
    to_dict,
)
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes, one_device, shard_batch
from ultramem_jax.parallel.rules import LOGICAL_AXES, logical_axes, parameter_specs
from ultramem_jax.presets import PRESETS, families
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.state import abstract_state

MEMORY = families.ultramem(num_keys=8, top_m=4, value_dim=16, num_cores=2)
MODEL = ModelConfig(
    embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=32, memories={"memory": MEMORY}
)
CONFIG = RunConfig(MODEL, train=TrainConfig(batch_size=16))


def test_devices_that_no_axis_takes_are_data():
    assert dict(make_mesh(MeshConfig(memory=4)).shape) == {
        "data": 2,
        "fsdp": 1,
        "tensor": 1,
        "memory": 4,
        "width": 1,
    }
    assert make_mesh(MeshConfig()).shape["data"] == 8 and one_device().mesh.size == 1


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=4, memory=4), r"mesh = 'data:4,memory:4': makes 16, there are 8 devices"),
        (
            MeshConfig(memory=3),
            r"mesh = 'data:0,memory:3': its other axes make 3, which does not divide the 8 devices",
        ),
    ],
)
def test_a_mesh_must_be_made_of_all_devices(mesh, message):
    with pytest.raises(UserError, match=message):
        make_mesh(mesh)


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({}, dict(memory=3), "mesh.memory = 3: must divide num_slots of a table = 64"),
        (
            dict(partition="width"),
            dict(memory=32),
            "mesh.memory = 32: must divide model.memories.memory.table.value_dim = 16",
        ),
        (
            dict(partition="width", value_dim=18, num_cores=3),
            dict(memory=2),
            "mesh.memory = 2: must divide the 3 weights of a read of model.memories.memory or be a multiple",
        ),
        (
            dict(partition="both", pre_value_dim=7),
            dict(width=2),
            "mesh.width = 2: must divide model.memories.memory.table.pre_value_dim = 7",
        ),
        (
            {},
            dict(width=2),
            "mesh.width = 2: must be 1 while model.memories.memory.table.partition is 'slots'",
        ),
        (dict(partition="rows"), {}, "unknown table.partition 'rows': "),
        (
            dict(memory_kind="pinned_host"),
            dict(memory=2),
            "memory.table.memory_kind = 'pinned_host': must be 'device' while tables are split",
        ),
        ({}, dict(memory=0), "mesh.memory = 0: must be at least 1"),
        ({}, dict(fsdp=3), "mesh.fsdp = 3: must divide model.embed_dim = 16"),
        ({}, dict(tensor=4), "mesh.tensor = 4: must divide model.num_kv_heads = 2"),
    ],
)
def test_what_does_not_divide_is_refused(changes, mesh, message):
    with pytest.raises(UserError, match=message):
        replace(
            CONFIG,
            model=replace(MODEL, memories={"memory": MEMORY.changed(**changes)}),
            mesh=MeshConfig(**mesh),
        )


@pytest.mark.parametrize(
    ("moe", "mesh", "message"),
    [
        (MoEConfig(num_experts=6), dict(memory=4), "mesh.memory = 4: must divide model.moe.num_experts = 6"),
        (MoEConfig(expert_dim=7), dict(tensor=2), "mesh.tensor = 2: must divide model.moe.expert_dim = 7"),
        (None, dict(memory=2), "mesh.memory = 2: must be 1 without a memory and without experts"),
        (None, dict(width=2), "mesh.width = 2: must be 1 without a memory"),
    ],
)
def test_without_tables_there_may_be_nothing_to_split(moe, mesh, message):
    with pytest.raises(UserError, match=message):
        RunConfig(replace(MODEL, memories={}, moe=moe), mesh=MeshConfig(**mesh))


def test_a_batch_must_divide_over_the_devices_that_share_it():
    config = replace(CONFIG, train=TrainConfig(batch_size=12), mesh=MeshConfig(data=2, memory=4))
    with pytest.raises(
        UserError, match=r"batch_size = 12: a micro-batch of 12 .* 8 devices along data, memory"
    ):
        mesh_axes(config, make_mesh(config.mesh))
    same_tokens = replace(config, mesh=replace(config.mesh, batch_over_memory=False))
    axes = mesh_axes(same_tokens, make_mesh(config.mesh))
    assert axes.tokens == ("data",) and axes.slots == ("memory",) and axes.replicas == ("data",)


def test_a_batch_lies_in_the_order_of_its_sequences():
    axes = mesh_axes(CONFIG, make_mesh(MeshConfig(data=2, memory=4)))
    batch = np.arange(16 * 3).reshape(16, 3)
    array = shard_batch(batch, axes)
    chex.assert_trees_all_equal(array, batch)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}


def test_parameters_and_their_moments_lie_as_the_rules_say():
    config = replace(CONFIG, mesh=MeshConfig(data=1, fsdp=2, tensor=2, memory=2))
    axes = mesh_axes(config, make_mesh(config.mesh))
    state = abstract_state(config, make_optimizers(config), axes)
    adam = state.opt_state[1][0]
    for params in (state.params, adam.mu, adam.nu):
        specs = jax.tree.map(lambda a: a.sharding.spec, params)
        attention = specs["layer_1"]["attention"]
        assert attention["w_query"] == P("fsdp", "tensor") and attention["w_out"] == P("tensor", "fsdp")
        assert specs["layer_2"]["feed_forward"]["w_in"] == P("fsdp", "tensor")
        assert specs["embedding"] == P(None, "fsdp")  # two do not divide 257 words
        assert specs["memory_0"]["keys"] == P(None, None, None, "fsdp", None)
        assert specs["memory_0"]["query_scale"] == P(None)
    table, moments = state.tables["memory_0"]["values"], state.table_state["memory_0"]["values"]
    assert table.sharding.spec == moments.first.sharding.spec == P(("memory",), ())
    assert state.usage["memory_0"].seen.sharding.spec == P(("memory",))
    assert table.sharding.shard_shape(table.shape) == (32, 16)


def test_experts_lie_apart_from_mlps():
    config = RunConfig(
        replace(MODEL, memories={}, moe=MoEConfig(num_experts=8, activation="swiglu")),
        mesh=MeshConfig(data=1, fsdp=2, tensor=2, memory=2),
    )
    axes = mesh_axes(config, make_mesh(config.mesh))
    params = abstract_state(config, make_optimizers(config), axes).params["layer_1"]["feed_forward"]
    specs = {name: a.sharding.spec for name, a in params.items()}
    assert specs == {
        "router": P("fsdp", None),
        "w_in": P("memory", "fsdp", "tensor"),
        "w_gate": P("memory", "fsdp", "tensor"),
        "w_out": P("memory", "tensor", "fsdp"),
    }


def test_every_parameter_of_every_preset_has_a_rule():
    used = set()
    axes = one_device()
    of_family = {  # one of each kind: shapes do not matter here
        (p.moe is not None, *(frozenset(site.parameters) for site in p.sites[:1])): p
        for p in PRESETS.values()
    }
    adapters = TrainConfig(lora_rank=2, trainable="lora/")
    runs = [RunConfig(model) for model in of_family.values()]
    runs.append(RunConfig(replace(MODEL, attention_bias="all"), train=adapters))
    for config in runs:
        params = abstract_state(config, make_optimizers(config), axes).params
        parameter_specs(params, axes, logical_axes(config.model))  # raises for an unknown name
        for path, _ in jax.tree_util.tree_leaves_with_path(params):
            used.add(path[-1].key)
    assert {rule.split("/")[-1] for rule in LOGICAL_AXES} - used <= {"output", "w_gate"}


def test_configs_from_before_there_were_meshes_are_read():
    tree = to_dict(CONFIG)
    assert run_config_from_dict({k: v for k, v in tree.items() if k != "mesh"}) == CONFIG
    assert run_config_from_dict(tree) == CONFIG
