"""Computes Engram's hash: the rows of n-gram tables from token ids (arXiv 2601.07372, section 2.2).

The hash is defined on 64-bit integers, which JAX does not have without its x64 mode. Here a 64-bit number is
two uint32, its high and its low half. Every result is exact: the rows are those of the reference in int64
NumPy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.kernels import calls
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.ngram_constants import MAX_ROWS, MIN_ROWS
from ultramem_jax.ops.on_mesh import per_token

_DIGIT = 20
"""Bits that a step of the long division adds: float32, with its 24 bits, must hold a quotient below 2²⁰."""


class _Word(NamedTuple):
    """Holds 64-bit numbers as two uint32 of one shape."""

    high: jax.Array
    """The upper 32 bits."""
    low: jax.Array
    """The lower 32 bits."""


def ngram_slots(
    ids: jax.Array,
    multipliers: np.ndarray,
    sizes: Sequence[int],
    orders: Sequence[int],
    *,
    pad_id: int,
    previous: jax.Array | None = None,
) -> jax.Array:
    """Returns the row that every head reads at every position: Engram's hash of the n-gram that ends there.

    For order n the hash is the XOR over i < n of id(t - i)·multipliers[i], modulo 2⁶⁴ and read as a signed
    number. The row is that hash modulo the head's size and never negative, as with NumPy's `%`. (With the
    multipliers of `ops.ngram_constants` and ids below V_c the hash itself is never negative.)

    Args:
        ids: (B, S) int32, canonical token ids, none negative.
        multipliers: at least (n_max,) int64, in NumPy, with n_max = max(orders).
        sizes: numbers of rows of the R = len(orders)·K heads' tables, sorted by order and then by head, each
            in [MIN_ROWS, MAX_ROWS]. Those of `head_sizes` are primes.
        orders: lengths n of the n-grams, each at least 1.
        pad_id: canonical id that pads the start of a sequence.
        previous: (B, n_max - 1) int32, the canonical ids just before `ids`, for a sequence that comes in
            chunks; by default all are `pad_id`.

    Returns:
        (B, S, R) int32; head r's rows are in [0, sizes[r]).

    Raises:
        ValueError: sizes are out of range or not equally many per order, multipliers are too few, or
            `previous` has another shape.
    """
    if not all(MIN_ROWS <= size <= MAX_ROWS for size in sizes):
        raise ValueError(f"sizes must be in [{MIN_ROWS}, {MAX_ROWS}], got {tuple(sizes)}")
    span = max(orders)
    if len(sizes) % len(orders) or len(multipliers) < span:
        raise ValueError(
            f"{len(sizes)} sizes and {len(multipliers)} multipliers do not fit the orders {tuple(orders)}"
        )
    batch = ids.shape[0]
    if previous is None:
        previous = jnp.full((batch, span - 1), pad_id, jnp.int32)
    elif previous.shape != (batch, span - 1):
        raise ValueError(f"previous must be of shape {(batch, span - 1)}, got {previous.shape}")
    window = jnp.concatenate([previous, ids], axis=1)

    def plain(window: jax.Array) -> jax.Array:
        return _slots(window, multipliers, sizes, orders)

    def kernel(window: jax.Array) -> jax.Array:
        return calls.ngram_slots(window, multipliers, sizes, orders)

    # Each device hashes its own sequences: the compiler cannot split a kernel.
    return per_token(lambda window: native_or(plain, kernel, ids.size > 0, window), (window,))


def _slots(
    window: jax.Array, multipliers: np.ndarray, sizes: Sequence[int], orders: Sequence[int]
) -> jax.Array:
    span = max(orders)
    batch, length = window.shape[0], window.shape[1] - span + 1
    hashes: list[_Word] = []
    for i in range(span):
        ids = window[:, span - 1 - i : span - 1 - i + length].astype(jnp.uint32)
        word = _product(ids, int(multipliers[i]))
        hashes.append(_Word(*map(jnp.bitwise_xor, hashes[-1], word)) if hashes else word)
    chosen = _Word(*(jnp.stack(half, -1) for half in zip(*(hashes[n - 1] for n in orders), strict=True)))
    return _remainders(chosen, np.reshape(sizes, (len(orders), -1))).reshape(batch, length, len(sizes))


def exact_slots(ids: jax.Array) -> jax.Array:
    """Returns the rows of a table with one row per canonical id, which are the ids themselves.

    A per-layer embedding is addressed like this (STEM, arXiv 2601.10639): order 1, one head, no hash.

    Args:
        ids: (B, S) int32 in [0, V_c).

    Returns:
        (B, S, 1) int32.
    """
    return ids.astype(jnp.int32)[..., None]


def _product(x: jax.Array, factor: int) -> _Word:
    """Returns x · factor modulo 2⁶⁴ for uint32 `x` of any shape and any 64-bit integer `factor`."""
    high, low = np.uint32(factor >> 32 & 0xFFFFFFFF), np.uint32(factor & 0xFFFFFFFF)
    # The high half of x · low is made of products of 16-bit halves. These fit 32 bits together with what is
    # added to them. Only x · high and its sum with that half wrap around, as they should.
    x0, x1 = x & 0xFFFF, x >> 16
    low0, low1 = np.uint32(low & 0xFFFF), np.uint32(low >> 16)
    middle = x1 * low0 + (x0 * low0 >> 16)
    carry = x0 * low1 + (middle & 0xFFFF)
    return _Word(x1 * low1 + (middle >> 16) + (carry >> 16) + x * high, x * low)


def _remainders(x: _Word, sizes: np.ndarray) -> jax.Array:
    """Returns signed x (..., O) modulo every size (O, K): (..., O, K) int32."""
    sizes = sizes.reshape((1,) * (x.high.ndim - 1) + sizes.shape)
    p = sizes.astype(np.uint32)
    inverse = (2.0**_DIGIT / sizes * (1 - 2.0**-21)).astype(np.float32)  # a little too small: see `_append`
    high, low = x.high[..., None], x.low[..., None]
    # Long division from the top: 4 bits, then three digits of 20 bits. The top bit counts as -2⁶³. So where
    # it is set, the top four bits count as their number minus 16.
    top = high >> 28
    remainder = jnp.where(top >= 8, top + (-16 % sizes).astype(np.uint32), top)
    if sizes.min() < 16:  # otherwise the remainder is already below p
        remainder = remainder % p
    mask = (1 << _DIGIT) - 1
    for digit in (high >> 8 & mask, (high << 12 | low >> 20) & mask, low & mask):
        remainder = _append(remainder, digit, p, inverse)
    return remainder.astype(jnp.int32)


def _append(remainder: jax.Array, digit: jax.Array, p: np.ndarray, inverse: np.ndarray) -> jax.Array:
    """Returns (remainder·2²⁰ + digit) mod p, for remainder < p < 2³¹ and digit < 2²⁰, all uint32.

    The exact quotient is below 2²⁰. Its estimate in float32 is too small by a factor 1 - 2⁻²¹ on purpose.
    Four roundings change it by a factor 1 ± 2⁻²¹ at most, even on hardware that truncates. So the estimate is
    never above the exact quotient, and less than 1 below. Its whole part is right or one too small. What
    remains is below 2p < 2³². It is therefore right, although its terms wrap around.
    """
    dividend = _as_float(remainder) + _as_float(digit) * np.float32(2.0**-_DIGIT)
    quotient = (dividend * inverse).astype(jnp.int32).astype(jnp.uint32)
    rest = (remainder << _DIGIT) + digit - quotient * p
    return jnp.minimum(rest, rest - p)  # where rest < p, rest - p wraps around to a large number


def _as_float(x: jax.Array) -> jax.Array:
    # These numbers fit int32, which CPUs convert to float32 in one instruction.
    return x.astype(jnp.int32).astype(jnp.float32)
