"""The lookup over a mesh against its definition, in float64 NumPy."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.support.chunk_values import set_chunk_values
from ultramem_jax.config import MeshConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.ops import sharded_lookup
from ultramem_jax.ops.on_mesh import current_axes, on_mesh, per_token, sum_over_tokens
from ultramem_jax.ops.owned_rows import owned_reads, pooled_of_owned, products_of_owned
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes
from ultramem_jax.presets import families

T, R, E, CORES, N, D_V, D_P = 16, 6, 4, 2, 32, 8, 8

MESHES = {
    "replicas alone": ("slots", MeshConfig(data=8)),
    "slots": ("slots", MeshConfig(data=2, memory=4)),
    "slots, one group": ("slots", MeshConfig(memory=8)),
    "width, slices of cores": ("width", MeshConfig(data=4, memory=2)),
    "width, parts of slices": ("width", MeshConfig(data=2, memory=4)),
    "both": ("both", MeshConfig(data=2, memory=2, width=2)),
    "slots, the same tokens": ("slots", MeshConfig(data=2, memory=4, batch_over_memory=False)),
    "both, the same tokens": ("both", MeshConfig(data=2, memory=2, width=2, batch_over_memory=False)),
    "slots, with tensor": ("slots", MeshConfig(data=2, tensor=2, memory=2)),
}


def _axes(name):
    partition, mesh = MESHES[name]
    memory = families.ultramem(num_keys=8, top_m=4, value_dim=D_V, partition=partition)
    config = RunConfig(ModelConfig(memories={"memory": memory}), train=TrainConfig(batch_size=8), mesh=mesh)
    return mesh_axes(config, make_mesh(mesh))


class Problem(NamedTuple):
    values: np.ndarray
    pre_values: np.ndarray
    slots: np.ndarray
    blocks: np.ndarray
    scores: np.ndarray
    vectors: np.ndarray
    cotangent: np.ndarray


@functools.cache
def _problem(hot=False):
    rng = np.random.default_rng(0)
    slots = np.full((T, R), 5) if hot else rng.integers(0, N, (T, R))
    return Problem(
        values=rng.normal(size=(N, D_V)),
        pre_values=rng.normal(size=(N, D_P)),
        slots=slots.astype(np.int32),
        blocks=rng.integers(0, E, (T, R)).astype(np.int32),
        scores=rng.normal(size=(T, R, CORES)),
        vectors=rng.normal(size=(T, D_P)),
        cotangent=rng.normal(size=(T, E, D_V)),
    )


def _by_definition(p, values, pre_values, scores, vectors):
    """Σ cotangent · pooled, pooled of scores times products; a loop over reads."""
    pooled = np.zeros((T, E, D_V))
    for t in range(T):
        for j in range(R):
            row, block = p.slots[t, j], p.blocks[t, j]
            weights = scores[t, j] * (pre_values[row] @ vectors[t])
            pooled[t, block] += np.repeat(weights, D_V // CORES) * values[row]
    return pooled


def _gradients_by_definition(p):
    d_values, d_pre = np.zeros_like(p.values), np.zeros_like(p.pre_values)
    d_scores, d_vectors = np.zeros_like(p.scores), np.zeros_like(p.vectors)
    for t in range(T):
        for j in range(R):
            row, block = p.slots[t, j], p.blocks[t, j]
            product = p.pre_values[row] @ p.vectors[t]
            cotangent = p.cotangent[t, block]
            of_slices = (cotangent * p.values[row]).reshape(CORES, -1).sum(1)
            d_values[row] += cotangent * np.repeat(p.scores[t, j] * product, D_V // CORES)
            d_scores[t, j] = of_slices * product
            d_product = of_slices @ p.scores[t, j]
            d_pre[row] += d_product * p.vectors[t]
            d_vectors[t] += d_product * p.pre_values[row]
    return d_values, d_pre, d_scores, d_vectors


def _lookup(values, pre_values, slots, blocks, scores, vectors):
    slots, blocks = sharded_lookup.reads_at_owners(slots, blocks, E)
    sums, _ = sharded_lookup.products_at_owners(pre_values, slots, vectors)
    weights = scores * sharded_lookup.products_at_tokens(sums)[..., None]
    sums, _ = sharded_lookup.pooled_at_owners(values, slots, blocks, weights, E)
    return sharded_lookup.pooled_at_tokens(sums)


def _on_devices(p, axes):
    """The problem in float32, tables and tokens split as they are in training."""
    tokens = axes.sharding(P(axes.tokens))
    table = axes.sharding(axes.table)
    arrays = [jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else jnp.int32) for a in p]
    return [jax.device_put(a, table if i < 2 else tokens) for i, a in enumerate(arrays)]


@pytest.mark.parametrize(
    ("name", "hot"), [*((name, False) for name in MESHES), ("slots", True), ("both", True)]
)
def test_lookup_and_its_gradients_equal_their_definition(name, hot):
    p, axes = _problem(hot), _axes(name)
    values, pre_values, slots, blocks, scores, vectors, cotangent = _on_devices(p, axes)

    @jax.jit
    def pooled_and_gradients(values, pre_values, scores, vectors):
        with on_mesh(axes):
            look = functools.partial(_lookup, slots=slots, blocks=blocks)
            pooled, pullback = jax.vjp(
                lambda v, u, s, x: look(values=v, pre_values=u, scores=s, vectors=x),
                values,
                pre_values,
                scores,
                vectors,
            )
            return pooled, pullback(cotangent)

    pooled, gradients = pooled_and_gradients(values, pre_values, scores, vectors)
    expected = _by_definition(p, p.values, p.pre_values, p.scores, p.vectors)
    chex.assert_trees_all_close(pooled, expected, rtol=1e-5, atol=1e-5)
    assert pooled.sharding.is_equivalent_to(axes.sharding(P(axes.tokens)), 3)
    chex.assert_trees_all_close(gradients, _gradients_by_definition(p), rtol=1e-5, atol=2e-5)
    assert gradients[0].sharding.is_equivalent_to(axes.sharding(axes.table), 2)


def test_what_the_owners_sum_are_parts_of_the_whole():
    p, axes = _problem(), _axes("slots")
    values, _, slots, blocks, scores, *_ = _on_devices(p, axes)

    @jax.jit
    def at_owners(values, slots, blocks, scores):
        with on_mesh(axes):
            assert sharded_lookup.pooled_shape(T, E, D_V) == (4, T, E, D_V)
            slots, blocks = sharded_lookup.reads_at_owners(slots, blocks, E)
            return slots, *sharded_lookup.pooled_at_owners(values, slots, blocks, scores, E)

    gathered, sums, _ = at_owners(values, slots, blocks, scores)
    chex.assert_trees_all_equal(gathered, p.slots)
    for part in range(4):
        own = p.scores * (p.slots // (N // 4) == part)[..., None]
        rows = p.values[p.slots] * np.repeat(own, D_V // CORES, axis=2)
        expected = np.stack([(rows * (p.blocks == e)[..., None]).sum(1) for e in range(E)], axis=1)
        chex.assert_trees_all_close(sums[part], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 8, 24])
def test_owned_rows_are_the_lookup_without_the_others(first, monkeypatch, without_kernels):

    p, own = _problem(), 8
    slots, blocks, start = jnp.asarray(p.slots), jnp.asarray(p.blocks), jnp.int32(first)
    table = jnp.asarray(p.values[first : first + own], jnp.float32)
    scores, vectors = jnp.asarray(p.scores, jnp.float32), jnp.asarray(p.cotangent, jnp.float32)
    mine = (p.slots >= first) & (p.slots < first + own)
    rows = p.values[p.slots] * mine[..., None]
    weighed = rows * np.repeat(p.scores, D_V // CORES, axis=2)
    pooled = np.stack([(weighed * (p.blocks == e)[..., None]).sum(1) for e in range(E)], axis=1)
    of_reads = np.take_along_axis(p.cotangent, p.blocks[..., None], axis=1)
    products = (rows * of_reads).reshape(T, R, CORES, -1).sum(-1)
    owned = owned_reads(slots, start, own)
    assert int(owned.num_owned) == mine.sum()
    chex.assert_trees_all_equal(owned.places[: mine.sum()], np.flatnonzero(mine))
    for chunk_values in (1 << 22, 2 * D_V * 5):  # at once, and five reads at a time
        set_chunk_values(monkeypatch, chunk_values)
        pool = jax.jit(functools.partial(pooled_of_owned, expansion=E))
        multiply = jax.jit(functools.partial(products_of_owned, cores=CORES))
        chex.assert_trees_all_close(pool(table, slots, blocks, scores, start), pooled, rtol=1e-5, atol=1e-5)
        ours = multiply(table, slots, blocks, vectors, start)
        chex.assert_trees_all_close(ours, products, rtol=1e-5, atol=1e-5)


def test_a_function_of_tokens_sees_those_of_its_device():
    axes = _axes("slots")
    x = jax.device_put(jnp.arange(16.0), axes.sharding(P(axes.tokens)))

    @jax.jit
    def both(x):
        with on_mesh(axes):
            assert current_axes() is axes
            own = per_token(lambda x, shift: x - x[0] + shift, (x,), (jnp.float32(1.0),))
            return own, sum_over_tokens(lambda x: jnp.stack([x.sum(), x.max()]), (x,))

    own, sums = both(x)
    chex.assert_trees_all_equal(own, np.tile([1.0, 2.0], 8))  # two tokens on each device
    chex.assert_trees_all_equal(sums, np.array([120.0, 64.0]))  # the largest of each device: 1, 3, ... 15
    assert current_axes() is None
