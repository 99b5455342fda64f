"""Cases for native kernels: calls with random shapes and numbers, and what NumPy in float64 makes of them.

Where a kernel must be right to the bit, numbers are small integers: their sums are exact, and often equal.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = ml_dtypes.bfloat16


class RandomDraw:
    """Draws numbers of a case from a seed. Hypothesis has a class of its own, with the same methods."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def integer(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def choice(self, options):
        return options[self.integer(0, len(options) - 1)]


@dataclass
class Case:
    """A call of a kernel."""

    function: Callable[..., Any]
    """A function of `calls`."""
    arrays: tuple[Any, ...]
    """Arrays, or trees of them."""
    options: dict[str, Any]
    """Other arguments."""
    expected: list[Any]
    """Results, in float64; None where a result is not compared."""
    tolerance: float = 0.0
    """Largest difference, relative to the largest number of a result; 0 for equality to the bit."""
    compare: dict[int, Callable[[np.ndarray, Any], None]] = field(default_factory=dict)
    """Results, by number, that something else than `tolerance` compares."""


def integers(draw, *shape, bound=3):
    return draw.rng.integers(-bound, bound + 1, shape).astype(np.float32)


def normal(draw, *shape):
    return draw.rng.standard_normal(shape).astype(np.float32)


def normal_with_nan(draw, *shape):
    """A few of the numbers are NaN."""
    x = normal(draw, *shape)
    x[draw.rng.random(shape) < 0.02] = np.nan
    return x


def computed(draw, x):
    """An array in the dtype of a computation, and the same in float64."""
    x = x.astype(draw.choice([np.float32, BFLOAT16]))
    return x, x.astype(np.float64)


def tolerance(*arrays):
    return 1e-2 if any(a.dtype == BFLOAT16 for a in arrays) else 2e-6


def check(case, results):
    """Compares the results of a case, as arrays, with what is expected."""
    assert len(results) == len(case.expected)
    for number, (found, wanted) in enumerate(zip(results, case.expected, strict=True)):
        found = np.asarray(found)
        if number in case.compare:
            case.compare[number](found, wanted)
        elif case.tolerance:
            scale = max(np.abs(wanted).max(initial=0), 1e-6)
            np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=case.tolerance * scale)
        elif np.issubdtype(found.dtype, np.floating):
            np.testing.assert_array_equal(found.view(np.int32), np.asarray(wanted, np.float32).view(np.int32))
        else:
            np.testing.assert_array_equal(found, wanted)
