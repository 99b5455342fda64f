"""Which programs get a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.kernels import native
from ultramem_jax.kernels.dispatch import native_or
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
