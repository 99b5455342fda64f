import math
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ultramem_jax import MeshConfig, ModelConfig, MoEConfig, RunConfig
from ultramem_jax.config import TrainConfig
from ultramem_jax.layers.expert_parallel import exchange_capacity, overflow_capacity
from ultramem_jax.layers.moe import MoE
from ultramem_jax.ops.on_mesh import on_mesh
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes
from ultramem_jax.parallel.rules import parameter_shardings

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


def tokens(length=S, crowded=0):
    """X (B, S, D) of mixed signs but for the first value, which is large in the first `crowded` sequences."""
    x = np.random.default_rng(1).normal(size=(B, length, D)).astype(np.float32)
    x[:, :, 0] = 0
    x[:crowded, :, 0] = 20
    return x


@cache
def parameters(moe):
    """The router's first row sends what `tokens` crowds to the first K experts, which have one owner."""
    layer = MoE(ModelConfig(embed_dim=D, num_heads=1, num_kv_heads=1, moe=moe))
    params = jax.jit(lambda: layer.init(jax.random.key(0), jnp.zeros((1, 1, D)), train=False)["params"])()
    params["router"] = params["router"].at[0].set(jnp.where(jnp.arange(X) < K, 1.0, 0.0))
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
    params = jax.device_put(tree, parameter_shardings(tree, axes))["feed_forward"]
    return axes, params, jax.device_put(x, axes.sharding(P(axes.tokens)))


def check(moe, mesh, length=S, crowded=0):
    axes, params, x = placed(moe, mesh, tokens(length, crowded))
    with on_mesh(axes):
        got = jax.jit(step(moe))(params, x)
    assert got[1][0].sharding.is_equivalent_to(axes.sharding(P(axes.tokens)), 3)
    want = on_one_device(moe, length, crowded)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "moe, mesh",
    [
        (BLOCKS, MeshConfig(data=8)),
        (BLOCKS, MeshConfig(data=4, memory=2)),
        (SWIGLU, MeshConfig(data=2, memory=4)),
        (SWIGLU, MeshConfig(memory=8)),
        (RAGGED, MeshConfig(data=2, memory=4)),
        (RAGGED, MeshConfig(fsdp=2, tensor=2, memory=2, batch_over_memory=False)),
        (BLOCKS, MeshConfig(fsdp=2, tensor=2, memory=2)),
        (SWIGLU, MeshConfig(data=4, tensor=2)),
        (SWIGLU, MeshConfig(data=2, memory=4, batch_over_memory=False)),
        (BLOCKS, MeshConfig(memory=8, batch_over_memory=False)),
    ],
    ids=str,
)
def test_outputs_losses_metrics_and_gradients_equal_one_device(moe, mesh):
    check(moe, mesh)
