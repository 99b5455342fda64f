import math
import re
from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ultramem_jax import MeshConfig, ModelConfig, MoEConfig, RunConfig
from ultramem_jax.config import TrainConfig
from ultramem_jax.config.exchange_shapes import exchange_capacity, overflow_capacity
from ultramem_jax.layers.moe import MoE
from ultramem_jax.ops.on_mesh import on_mesh
from ultramem_jax.parallel.collectives import collectives_of
from ultramem_jax.parallel.mesh import AXES, in_words, make_mesh, mesh_axes
from ultramem_jax.parallel.rules import LOGICAL_AXES, parameter_specs

B, S, D, F, X, K = 8, 6, 4, 8, 8, 2
BLOCKS = MoEConfig(
    num_experts=X,
    expert_dim=F,
    top_k=K,
    implementation="blocks",
    load_balance_weight=0.5,
    router_z_weight=0.25,
)
SWIGLU = replace(BLOCKS, activation="swiglu", normalize_gates=False)
RAGGED = replace(BLOCKS, implementation="ragged")
GROUPS = replace(BLOCKS, implementation="groups")


def words(value):
    """A short name for a parameter of a test."""
    if isinstance(value, MoEConfig):
        return f"{value.activation}-{value.implementation}"
    if isinstance(value, MeshConfig):
        sizes = in_words({name: getattr(value, name) for name in AXES})
        return sizes if value.batch_over_memory else f"{sizes},same_tokens"
    return str(value)


def tokens(length=S, crowded=0):
    """X (B, S, D) of mixed signs but for the first value, which is large in the first `crowded` sequences."""
    x = np.random.default_rng(1).normal(size=(B, length, D)).astype(np.float32)
    x[:, :, 0] = 0
    x[:crowded, :, 0] = 8
    return x


@cache
def parameters(moe):
    """The router's first row sends what `tokens` crowds to the first k experts."""
    layer = MoE(ModelConfig(embed_dim=D, num_heads=1, num_kv_heads=1, moe=moe))
    params = jax.jit(lambda: layer.init(jax.random.key(0), jnp.zeros((1, 1, D)), train=False)["params"])()
    params["router"] = params["router"].at[0].set(jnp.where(jnp.arange(X) < moe.top_k, 1.0, 0.0))
    return jax.device_get(params)


def step(moe):
    """(params, x) -> (gradients by both, (y, losses and metrics)), of a loss that everything enters."""
    layer = MoE(ModelConfig(embed_dim=D, num_heads=1, num_kv_heads=1, moe=moe))

    def loss(params, x):
        y, sown = layer.apply({"params": params}, x, train=True, mutable=["losses", "metrics"])
        probe = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        return jnp.sum(y * probe) + sum(sown["losses"].values()), (y, sown)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)


@cache
def on_one_device(moe, length, crowded):
    return jax.device_get(jax.jit(step(moe))(parameters(moe), tokens(length, crowded)))


def placed(moe, mesh, x):
    """The axes of a run on that mesh, and parameters and tokens as they lie there."""
    model = ModelConfig(embed_dim=D, num_heads=mesh.tensor, num_kv_heads=mesh.tensor, moe=moe)
    config = RunConfig(model=model, mesh=mesh, train=TrainConfig(batch_size=B))
    axes = mesh_axes(config, make_mesh(mesh))
    tree = {"feed_forward": parameters(moe)}
    shardings = jax.tree.map(axes.sharding, parameter_specs(tree, axes, LOGICAL_AXES))
    params = jax.device_put(tree, shardings)["feed_forward"]
    return axes, params, jax.device_put(x, axes.sharding(P(axes.tokens)))


def check(moe, mesh, length=S, crowded=0):
    axes, params, x = placed(moe, mesh, tokens(length, crowded))
    with on_mesh(axes):
        got = jax.jit(step(moe))(params, x)
    assert got[1][0].sharding.is_equivalent_to(axes.sharding(P(axes.tokens)), 3)
    want = on_one_device(moe, length, crowded)
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "moe, mesh",
    [
        (BLOCKS, MeshConfig(data=8)),
        (BLOCKS, MeshConfig(data=4, memory=2)),
        (SWIGLU, MeshConfig(data=2, memory=4)),
        (SWIGLU, MeshConfig(memory=8)),
        (RAGGED, MeshConfig(data=2, memory=4)),
        (GROUPS, MeshConfig(data=2, memory=4)),
        (RAGGED, MeshConfig(fsdp=2, tensor=2, memory=2, batch_over_memory=False)),
        (BLOCKS, MeshConfig(fsdp=2, tensor=2, memory=2)),
        (SWIGLU, MeshConfig(data=4, tensor=2)),
        (SWIGLU, MeshConfig(data=2, memory=4, batch_over_memory=False)),
        (BLOCKS, MeshConfig(memory=8, batch_over_memory=False)),
    ],
    ids=lambda value: (
        f"{value.activation}-{value.implementation}" if isinstance(value, MoEConfig) else words(value)
    ),
)
def test_outputs_losses_metrics_and_gradients_equal_one_device(moe, mesh):
    check(moe, mesh)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(memory=8), MeshConfig(data=2, memory=4, batch_over_memory=False)], ids=words
)
def test_fewer_assignments_than_experts(mesh):
    # One token per device, or four on each group of owners: most experts have none, most rows are empty.
    check(replace(BLOCKS, top_k=1), mesh, length=1)


@pytest.mark.parametrize(
    "moe, mesh, crowded",
    [
        (replace(BLOCKS, top_k=1), MeshConfig(memory=8), B),
        # One group goes through further rounds, the other does not.
        (SWIGLU, MeshConfig(data=2, memory=4), B // 2),
        (RAGGED, MeshConfig(memory=4, tensor=2), B),
    ],
    ids=words,
)
def test_nothing_is_dropped_when_all_tokens_choose_one_owner(moe, mesh, crowded):
    length = 12
    chosen = np.argsort(-(tokens(length, crowded)[:crowded] @ parameters(moe)["router"]))[..., : moe.top_k]
    assert chosen.max() < moe.top_k <= X // mesh.memory
    load = B * length * moe.top_k // (8 // mesh.tensor)
    capacity = exchange_capacity(load, mesh.memory)
    assert load > capacity + overflow_capacity(capacity)  # two further rounds at least
    check(moe, mesh, length, crowded)


def test_capacity_hand_worked():
    # Means of 1024, 3, 1.5 and 1/8; four deviations are 128, 6.9, 4.9 and 1.4; multiples of 4, at most all.
    sizes = [(8192, 8), (24, 8), (12, 8), (1, 8)]
    assert [exchange_capacity(*size) for size in sizes] == [1152, 12, 8, 1]
    assert [overflow_capacity(rows) for rows in (1152, 12, 9, 1)] == [288, 3, 3, 1]


@pytest.mark.parametrize("assignments, owners", [(64, 4), (1024, 8), (8192, 64)])
def test_a_uniform_router_seldom_needs_a_further_round(assignments, owners):
    rng = np.random.default_rng(0)
    loads = rng.multinomial(assignments, np.full(owners, 1 / owners), size=(500, owners))
    exceeded = np.mean(loads.max(axis=(1, 2)) > exchange_capacity(assignments, owners))
    assert exceeded < (0.01 if owners <= 8 else 0.2)


def compiled_step(moe, mesh, length):
    """The compiled step's text, and the devices."""
    axes, params, x = placed(moe, mesh, tokens(length))
    with on_mesh(axes):
        return jax.jit(step(moe)).lower(params, x).compile().as_text(), axes.mesh


def collectives(text):
    """(kind, shapes of its results) of every collective in a program's text."""
    kinds = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute|collective-broadcast"
    found = re.findall(rf"^ *(?:ROOT )?%\S+ = (.*?) ({kinds})(?:-start)?\(", text, re.MULTILINE)
    return [(kind, array_shapes(types)) for types, kind in found]


def array_shapes(types):
    """[(2, 4), ()] of `(f32[2,4]{1,0}, s32[])`."""
    return [
        tuple(map(int, filter(None, sizes.split(",")))) for sizes in re.findall(r"[fs]32\[(.*?)\]", types)
    ]


@pytest.mark.parametrize("mesh", [MeshConfig(memory=8), MeshConfig(data=2, memory=4)], ids=words)
def test_bytes_of_the_compiled_step_are_those_of_the_formulas(mesh):
    owners, length = mesh.memory, 12
    text, devices = compiled_step(BLOCKS, mesh, length)
    found = collectives(text)
    assert {kind for kind, _ in found} == {"all-to-all", "all-reduce"}
    sent = [
        4 * sum(map(math.prod, shapes)) * (owners - 1) // owners
        for kind, shapes in found
        if kind == "all-to-all"
    ]
    capacity = exchange_capacity(B * length * K // 8, owners)
    row = 4 * (owners - 1) * D
    loads, first, further = 4 * X * (owners - 1) // owners, row * capacity, row * overflow_capacity(capacity)
    # Forward and backward: loads, 2 + 2 of the first round, 2 + 4 in the loops of further rounds.
    assert sorted(sent) == sorted([loads] + 4 * [first] + 6 * [further])

    reduced = [shapes for kind, shapes in found if kind == "all-reduce"]
    own = {(X // owners, D, F), (X // owners, F, D)}
    of_experts = [shapes for shapes in reduced if own & set(shapes)]
    if owners == 8:
        assert of_experts == []
    else:
        (shapes,) = of_experts
        assert set(shapes) == own and len(shapes) == 2
        size = 4 * sum(map(math.prod, own))
        assert [c.axes for c in collectives_of(text, devices) if c.operand_bytes == size] == [("data",)]
    others = {tuple(sorted(shape)) for shapes in reduced for shape in shapes if shape not in own}
    assert others == {(), (X,), (D, X)}  # rounds and losses, loads, the router


def test_experts_that_are_not_split_are_reduced_once():
    found = collectives(compiled_step(SWIGLU, MeshConfig(data=8), S)[0])
    assert {kind for kind, _ in found} == {"all-reduce"}
    shapes = [shape for _, shapes in found for shape in shapes]
    assert sorted(shape for shape in shapes if len(shape) == 3) == [(X, D, F), (X, D, F), (X, F, D)]


def test_bfloat16_is_exchanged_as_it_is():
    moe = BLOCKS
    axes, params, x = placed(moe, MeshConfig(data=2, memory=4), tokens())
    layer = MoE(ModelConfig(embed_dim=D, num_heads=1, num_kv_heads=1, dtype="bfloat16", moe=moe))

    def loss(params, x):
        y = layer.apply({"params": params}, x, train=True)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    with on_mesh(axes):
        lowered = jax.jit(gradient).lower(params, x)
    exchanged = re.findall(r"stablehlo.all_to_all.*-> tensor<(\S+)>", lowered.as_text())
    assert sorted(exchanged) == ["48x4xbf16"] * 4 + ["4x2xi32"]
    want = jax.jit(gradient)(parameters(moe), tokens())
    for a, b in zip(jax.tree.leaves(lowered.compile()(params, x)), jax.tree.leaves(want), strict=True):
        chex.assert_type(a, b.dtype)
        chex.assert_trees_all_close(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02, atol=0.02
        )
