"""Small singular value decompositions in plain JAX, beside LAPACK's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.algorithms import choosing
from ultramem_jax.ops.small_svd import LARGEST, singular_values, small_svd

EPS = np.finfo(np.float32).eps


def _matrices(kind, rows):
    rng = np.random.default_rng(rows)
    match kind:
        case "positive":  # as cores are initialised
            return rng.random((300, rows, rows))
        case "normal":
            return rng.standard_normal((300, rows, rows))
        case "rank one":
            return rng.standard_normal((300, rows, 1)) * rng.standard_normal((300, 1, rows))
        case "small and large":
            return rng.standard_normal((40, rows, rows)) * 10.0 ** rng.integers(-15, 15, (40, 1, 1))
    one = np.eye(rows)
    alike = [np.zeros((rows, rows)), one, -one, one[::-1], np.ones((rows, rows)), np.diag(np.arange(rows))]
    return np.stack([*alike, 1e-20 * one, 1e15 * np.ones((rows, rows))])


KINDS = ("positive", "normal", "rank one", "small and large", "degenerate")


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_leading_vectors_are_lapacks(kind, rows):
    matrices = _matrices(kind, rows).astype(np.float32)
    with choosing(svd="small"):
        left, values, right = map(np.asarray, jax.jit(small_svd)(jnp.asarray(matrices)))
    u, s, vt = np.linalg.svd(matrices.astype(np.float64))
    size = np.maximum(s[:, 0], 1e-30)
    np.testing.assert_allclose(values / size[:, None], s / size[:, None], atol=10 * EPS)
    again = left * values[:, None] @ right
    assert (np.abs(again - matrices).max((1, 2)) / size).max() < 10 * EPS
    # The leading vectors are unit vectors, and those of LAPACK where the first value stands apart.
    for vectors in (left[:, :, 0], right[:, 0]):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=10 * EPS)
    apart = np.ones(len(s), bool) if rows == 1 else s[:, 0] - s[:, 1] > 0.05 * size
    for found, expected in ((left[:, :, 0], u[:, :, 0]), (right[:, 0], vt[:, 0])):
        alike = np.abs((found * expected).sum(-1))[apart]
        np.testing.assert_allclose(alike, 1, atol=1e-5)


@pytest.mark.parametrize("rows, share", [(1, 1.0), (2, 1.0), (3, 0.85), (4, 0.9), (8, 0.97)])
@pytest.mark.parametrize("kind", ["positive", "normal", "degenerate"])
def test_the_sign_is_lapacks(kind, rows, share):
    matrices = _matrices(kind, rows).astype(np.float32)
    with choosing(svd="small"):
        left = np.asarray(small_svd(jnp.asarray(matrices)).left)[:, :, 0]
    expected = np.linalg.svd(matrices)[0][:, :, 0]
    # Of equal values any vector is a leading one: -1 has (0, 1) here and (1, 0) in LAPACK.
    product = (left * expected).sum(-1)
    assert (product > -1e-3).mean() >= share


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_the_derivative_of_singular_values(rows):
    matrices = jnp.asarray(_matrices("positive", rows), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((300, rows)), jnp.float32)

    def loss(matrices):
        return (jax.nn.relu(singular_values(matrices) - 0.15) ** 2 * weights).sum()

    with choosing(svd="small"):
        found = jax.jit(jax.grad(loss))(matrices)
    expected = jax.grad(loss)(matrices)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
    with choosing(svd="small"):
        assert np.isfinite(jax.grad(loss)(jnp.zeros_like(matrices))).all()


def test_larger_matrices_go_to_the_library():
    rows = LARGEST + 1
    matrices = jnp.asarray(_matrices("normal", rows)[:3], jnp.float32)
    with choosing(svd="small"):
        found = small_svd(matrices)
    np.testing.assert_array_equal(found.values, jnp.linalg.svd(matrices)[1])
