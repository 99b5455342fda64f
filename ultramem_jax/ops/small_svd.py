"""Decomposes small square matrices into singular values and vectors, without a library's solver.

A Tucker core has 2 rows, and never more than a few. On an accelerator, XLA calls cuSOLVER for it or makes a
loop of several hundred operations (docs/performance.md, "What their compilers made"). Two rows have a closed
form. Up to eight are rotated until their columns are orthogonal, by one-sided Jacobi rotations (Hestenes,
1958).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops.algorithms import algorithms

LARGEST = 8
"""Most rows of a matrix that is decomposed here; larger ones go to `jnp.linalg.svd`."""
_SWEEPS = 6
"""Sweeps of Jacobi rotations. Their convergence is quadratic: random matrices of 8 rows reach float32's
precision in five."""


class SingularVectors(NamedTuple):
    """Holds a decomposition C = Σ_i values_i · left_i · right_iᵀ; all are float32."""

    left: jax.Array
    """(..., r, r), left vectors as columns. Those of a value of zero may be zeros."""
    values: jax.Array
    """(..., r), singular values, largest first."""
    right: jax.Array
    """(..., r, r), right vectors as rows. Those of a value of zero are orthogonal to the others."""


def small_svd(matrices: jax.Array) -> SingularVectors:
    """Returns the singular value decomposition of matrices (..., r, r), without a gradient.

    The joint sign of the first pair of vectors is LAPACK's for r <= 2, but for exact ties such as
    [[1, 0], [1, 2]]. For larger r it is mostly so: for random cores of 3 rows in 99 of 100 with positive
    entries, in 90 with normal ones.
    """
    matrices = jax.lax.stop_gradient(matrices).astype(jnp.float32)
    rows = matrices.shape[-1]
    if algorithms().svd == "library" or rows > LARGEST:
        return SingularVectors(*jnp.linalg.svd(matrices))
    found = _of_two_rows(matrices) if rows == 2 else _by_rotations(matrices)
    sign = _lapack_sign(matrices, found.left[..., 0])[..., None]
    left = jnp.concatenate([found.left[..., :1] * sign[..., None], found.left[..., 1:]], axis=-1)
    right = jnp.concatenate([found.right[..., :1, :] * sign[..., None], found.right[..., 1:, :]], axis=-2)
    return SingularVectors(left, found.values, right)


def singular_values(matrices: jax.Array) -> jax.Array:
    """Returns the singular values (..., r) of matrices (..., r, r), largest first; differentiable once.

    The derivative of a value along D is leftᵀ·D·right.
    """
    if algorithms().svd == "library" or matrices.shape[-1] > LARGEST:
        return jnp.linalg.svd(matrices, compute_uv=False)
    found = small_svd(matrices)
    change = matrices - jax.lax.stop_gradient(matrices)
    along = (found.left.swapaxes(-1, -2)[..., :, :, None] * change[..., None, :, :]).sum(-2)
    return found.values + (along * found.right).sum(-1)


def _of_two_rows(matrices: jax.Array) -> SingularVectors:
    """Writes a matrix as rotation(φ) · diag(s, t) · rotation(θ): s is its first value, |t| its second."""
    a, b, c, d = (matrices[..., i, j] for i in range(2) for j in range(2))
    same, mirrored = jnp.hypot((a + d) / 2, (c - b) / 2), jnp.hypot((a - d) / 2, (c + b) / 2)
    turn, mirror = jnp.arctan2(c - b, a + d), jnp.arctan2(c + b, a - d)
    phi, theta = (turn + mirror) / 2, (turn - mirror) / 2
    second = same - mirrored
    flip = jnp.where(second < 0, -1.0, 1.0)
    left = jnp.stack([jnp.cos(phi), -jnp.sin(phi), jnp.sin(phi), jnp.cos(phi)], axis=-1)
    right = jnp.stack(
        [jnp.cos(theta), -jnp.sin(theta), flip * jnp.sin(theta), flip * jnp.cos(theta)], axis=-1
    )
    values = jnp.stack([same + mirrored, jnp.abs(second)], axis=-1)
    return SingularVectors(left.reshape(matrices.shape), values, right.reshape(matrices.shape))


def _by_rotations(matrices: jax.Array) -> SingularVectors:
    rows = matrices.shape[-1]
    columns = rows + rows % 2  # columns are rotated in pairs
    half = columns // 2
    room = [(0, 0)] * (matrices.ndim - 1)
    scale = jnp.max(jnp.abs(matrices), axis=(-2, -1), keepdims=True)
    scaled = matrices / jnp.where(scale > 0, scale, 1)
    work = jnp.pad(scaled, [*room, (0, columns - rows)])
    turned = jnp.broadcast_to(jnp.eye(columns, dtype=jnp.float32), (*matrices.shape[:-2], columns, columns))

    def rotate(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        work, turned = carry
        p, q = work[..., :half], work[..., half:]
        alpha, beta, gamma = (p * p).sum(-2), (q * q).sum(-2), (p * q).sum(-2)
        zeta = (beta - alpha) / jnp.where(gamma == 0, 1, 2 * gamma)
        tangent = jnp.where(zeta < 0, -1.0, 1.0) / (jnp.abs(zeta) + jnp.sqrt(1 + zeta * zeta))
        tangent = jnp.where(gamma == 0, 0.0, tangent)
        cosine = jax.lax.rsqrt(1 + tangent * tangent)
        sine = (cosine * tangent)[..., None, :]
        cosine = cosine[..., None, :]

        def turn(columns_of: jax.Array) -> jax.Array:
            p, q = columns_of[..., :half], columns_of[..., half:]
            p, q = cosine * p - sine * q, sine * p + cosine * q
            if half == 1:
                return jnp.concatenate([p, q], axis=-1)
            # A round robin: the first column stays and the others move on, so that all meet in a sweep.
            return jnp.concatenate([p[..., :1], q[..., :1], p[..., 1:-1], q[..., 1:], p[..., -1:]], axis=-1)

        return turn(work), turn(turned)

    work, turned = jax.lax.fori_loop(0, _SWEEPS * (columns - 1), rotate, (work, turned))
    lengths = jnp.sqrt((work * work).sum(-2))
    # The best first, by counting who is longer. The column that was added has length zero, and stays last.
    ahead = lengths[..., :, None] > lengths[..., None, :]
    earlier = jnp.triu(jnp.ones((columns, columns), bool), 1)
    equal = lengths[..., :, None] == lengths[..., None, :]
    ahead |= equal & jnp.broadcast_to(earlier, equal.shape)
    place = jax.nn.one_hot(ahead.sum(-2), columns, dtype=jnp.float32)[..., :rows]
    highest = jax.lax.Precision.HIGHEST
    ordered = (lengths[..., None] * place).sum(-2)
    left = jnp.matmul(work, place, precision=highest) / jnp.where(ordered > 0, ordered, 1)[..., None, :]
    unit = jnp.zeros((rows, rows), jnp.float32).at[0, 0].set(1.0)
    unit = jnp.broadcast_to(unit, left.shape)
    left = jnp.where(ordered[..., None, :1] > 0, left, unit)  # a matrix of zeros
    right = jnp.matmul(turned, place, precision=highest)[..., :rows, :].swapaxes(-1, -2)
    return SingularVectors(left, ordered * scale[..., 0], right)


def _lapack_sign(matrices: jax.Array, left: jax.Array) -> jax.Array:
    """Returns the sign (...) that makes the first left vector (..., r) LAPACK's.

    LAPACK first reflects the first column c onto an axis: q = -sign(c₁)·c/|c|, or the axis itself if c lies
    on it already. Its left vector then has a positive product with q, for r = 2 always unless the second
    diagonal entry of the reflected matrix is the larger one. Then the product with the second axis is
    positive.
    """
    first = matrices[..., 0]
    rows = first.shape[-1]
    if rows == 1:
        return jnp.ones_like(first[..., 0])
    rest = jnp.abs(first[..., 1:]).max(-1, keepdims=True)
    axis = jnp.broadcast_to(jnp.eye(rows, dtype=jnp.float32)[0], first.shape)
    onto = jnp.where(rest == 0, axis, jnp.where(first[..., :1] < 0, first, -first))
    if rows == 2:
        size = jnp.sqrt((onto * onto).sum(-1, keepdims=True))
        unit = onto / jnp.where(size > 0, size, 1)
        across = jnp.stack([unit[..., 1], -unit[..., 0]], axis=-1)
        across = jnp.where(rest == 0, axis[..., ::-1], across)
        diagonal = jnp.abs((unit * first).sum(-1)), jnp.abs((across * matrices[..., 1]).sum(-1))
        onto = jnp.where((diagonal[1] > diagonal[0])[..., None], across, onto)
    return jnp.where((left * onto).sum(-1) < 0, -1.0, 1.0)
