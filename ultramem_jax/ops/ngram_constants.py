"""Computes the constants of Engram's hash: multipliers and primes (Engram, arXiv 2601.07372, section 2.2).

They depend only on a config and need no JAX.
"""

from collections.abc import Sequence

import numpy as np

MIN_ROWS = 2
"""Fewest rows of a hashed table: the smallest prime."""
MAX_ROWS = 2**31 - 1
"""Most rows of a hashed table: row indices are int32. The number is a prime."""

_LAYER_STRIDE = 10007
"""Distance between the random seeds of two consecutive layers, as in the released demo of Engram."""


def multipliers(seed: int, layer_id: int, num_canonical_ids: int, max_order: int) -> np.ndarray:
    """Returns the odd random multipliers of a layer's hash, as in the released demo of Engram.

    Args:
        seed: seed of the model.
        layer_id: the layer's index in the model; every layer has multipliers of its own.
        num_canonical_ids: V_c. An id below V_c times a multiplier stays below 2⁶³ - 1.
        max_order: n_max, length of the longest n-gram.

    Returns:
        (n_max,) int64: factor of the id at the position itself, then of the id before it, and so on.
    """
    bound = max(1, (2**63 - 1) // num_canonical_ids // 2)
    random = np.random.default_rng(seed + _LAYER_STRIDE * layer_id)
    return 2 * random.integers(0, bound, max_order, np.int64) + 1


def head_sizes(wished: Sequence[int], num_heads: int, layers: int) -> tuple[tuple[int, ...], ...]:
    """Returns the number of rows of every head's table: distinct primes over the whole model.

    Heads are counted layer by layer, within a layer order by order. Each head takes the smallest prime that
    is at least the wished size and that no head before it has, as in the released demo of Engram.

    Args:
        wished: wished size of each order's tables, each in [MIN_ROWS, MAX_ROWS].
        num_heads: K, heads per order.
        layers: number of layers with n-gram tables.

    Returns:
        For each layer R = len(wished)·K sizes, sorted by order and then by head.

    Raises:
        ValueError: a wished size is out of range, or the primes up to MAX_ROWS do not suffice.
    """
    if not all(MIN_ROWS <= size <= MAX_ROWS for size in wished):
        raise ValueError(f"wished sizes must be in [{MIN_ROWS}, {MAX_ROWS}], got {tuple(wished)}")
    taken: set[int] = set()
    # All primes from a wished size up to the last one found for it are taken. The next search starts there.
    reached = {size: size - 1 for size in wished}
    sizes: list[tuple[int, ...]] = []
    for _ in range(layers):
        layer: list[int] = []
        for size in wished:
            for _ in range(num_heads):
                candidate = reached[size] + 1
                while candidate in taken or not is_prime(candidate):
                    candidate += 1
                if candidate > MAX_ROWS:
                    raise ValueError(f"wished sizes {tuple(wished)} leave too few primes up to {MAX_ROWS}")
                taken.add(candidate)
                reached[size] = candidate
                layer.append(candidate)
        sizes.append(tuple(layer))
    return tuple(sizes)


def is_prime(number: int) -> bool:
    """Tells whether an integer below 3,215,031,751 is a prime, by the test of Miller and Rabin.

    Bases 2, 3, 5 and 7 decide every number below that bound (Jaeschke 1993).
    """
    small = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if number < 2 or any(number % prime == 0 for prime in small):
        return number in small
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7):
        power = pow(base, odd, number)
        if power == 1:
            continue
        for _ in range(twos):
            if power == number - 1:
                break
            power = power * power % number
        else:
            return False
    return True
