"""Which programs get a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.kernels import native
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.cells import best_cells
from ultramem_jax.ops.key_norm import rms_norm_of_keys
from ultramem_jax.ops.key_scores import key_scores
from ultramem_jax.ops.lookup import pooled_lookup, row_products
from ultramem_jax.ops.topk import top_k

pytestmark = pytest.mark.skipif(not native.status().on, reason=str(native.status()))


def _program(function, *arguments, **options):
    return jax.jit(function).trace(*arguments).lower(**options).as_text()


def test_a_program_for_cpu_has_the_kernel_and_others_have_not():
    x = jnp.zeros((3, 100), jnp.float32)
    assert "ultramem_top_k" in _program(lambda x: top_k(x, 4), x)
    for platform in ("cuda", "tpu"):
        assert "ultramem" not in _program(lambda x: top_k(x, 4), x, lowering_platforms=(platform,))
    with native.turned_off():
        assert "ultramem" not in _program(lambda x: top_k(x, 4), x)


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "float16"])
def test_other_dtypes_have_not(dtype):
    assert "ultramem" not in _program(lambda x: top_k(x, 4), jnp.zeros((3, 100), dtype))


def test_a_kernel_runs_under_vmap_scan_and_shard_map():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5, 40)), jnp.float32)
    expected = jax.lax.top_k(x, 3)
    for name, found in {
        "vmap": jax.vmap(lambda x: top_k(x, 3))(x),
        "scan": jax.lax.map(lambda x: top_k(x, 3), x),
        "shard_map": jax.shard_map(
            lambda x: top_k(x, 3),
            mesh=jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=jax.P("d"),
            out_specs=jax.P("d"),
            check_vma=False,
        )(x),
    }.items():
        for f, e in zip(found, expected, strict=True):
            np.testing.assert_array_equal(f, e, err_msg=name)


def test_what_a_kernel_does_not_serve_jax_computes():
    double, triple = (lambda x: 2 * x), (lambda x: 3 * x)
    assert native_or(double, triple, True, jnp.float32(1)) == 3
    assert native_or(double, triple, False, jnp.float32(1)) == 2
    with native.turned_off():
        assert native_or(double, triple, True, jnp.float32(1)) == 2


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


SLOTS = jnp.asarray(np.random.default_rng(2).integers(0, 20, (6, 4)), jnp.int32)
INDEX = jnp.asarray(np.random.default_rng(3).integers(0, 9, (6, 2, 2, 3)), jnp.int32)
TABLE = _normal(1, 20, 8)
DIFFERENTIABLE = {
    "pooled_lookup": (lambda w: pooled_lookup(TABLE, SLOTS, SLOTS % 2, w, 2), (6, 4, 2)),
    "row_products": (lambda x: row_products(TABLE, SLOTS, x), (6, 8)),
    "key_scores by queries": (lambda q: key_scores(q, _normal(1, 2, 2, 2, 9, 4), INDEX), (6, 2, 2, 2, 4)),
    "key_scores by keys": (lambda k: key_scores(_normal(1, 6, 2, 2, 2, 4), k, INDEX), (2, 2, 2, 9, 4)),
    "best_cells": (lambda s: best_cells(s, _normal(1, 2, 2, 2, 2), 4)[1], (6, 2, 2, 2, 5)),
    "rms_norm_of_keys": (lambda k: rms_norm_of_keys(k, _normal(1, 2, 4), 1e-5), (2, 2, 2, 9, 4)),
}
"""Functions of one argument, and its shape."""


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_those_without_kernels(name):
    function, shape = DIFFERENTIABLE[name]
    x = _normal(0, *shape)

    def of_gradient(x):
        gradient = jax.grad(lambda x: (function(x) ** 3).sum())(x)
        return (gradient**2).sum()

    found = jax.jit(jax.grad(of_gradient))(x)
    with native.turned_off():
        expected = jax.jit(jax.grad(lambda x: of_gradient(x)))(x)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
