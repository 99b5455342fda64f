"""Times the lookup of a memory and the update of its rows beside FBGEMM, the row-sparse library of PyTorch.

Both take the weighted sum of the rows that a token reads, and update the rows by row-wise Adagrad, which both
have on CPU. Where FBGEMM is not installed, nothing is timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from experiments.bench_step.fbgemm import FbgemmLookup, OwnLookup, is_installed
from experiments.common.timing import WARM_UP, in_turns

FBGEMM = "FBGEMM, PyTorch"
WAYS = 3
"""Ways that take turns: two of ours, and FBGEMM."""


@dataclass(frozen=True)
class LookupResult:
    """Holds the times of one way of the lookup at one size."""

    slots: int
    way: str
    forward_ms: list[float]
    """Milliseconds of the weighted sums, in every round that counts."""
    backward_ms: list[float]
    """Milliseconds of the weights' gradient and of the rows' update, in every round that counts."""


class _Lookup(Protocol):
    def step(self, slots: np.ndarray, weights: np.ndarray, cotangent: np.ndarray) -> tuple[float, float]:
        """Returns the seconds of the forward pass, and of the backward pass with the update."""


def can_run(num_slots: int, tokens: int, reads: int, width: int, limit: int | None) -> bool:
    """Tells whether FBGEMM is installed and the tables of all ways fit into host memory together.

    Args:
        num_slots: N, rows of a table.
        tokens: T.
        reads: R, rows that a token reads.
        width: values of a row.
        limit: bytes that may be used; None is no limit.
    """
    tables, gathered = WAYS * num_slots * (width + 1) * 4, tokens * reads * width * 4
    return is_installed() and (limit is None or tables + 4 * gathered <= limit)


def measure(
    num_slots: int, tokens: int, reads: int, width: int, repeats: int, tick: Callable[[], object]
) -> list[LookupResult]:
    """Times the ways in turns, on the same random reads.

    Args:
        num_slots: N, rows of the table.
        tokens: T.
        reads: R, rows that a token reads.
        width: values of a row.
        repeats: rounds that count.
        tick: called after every step of a way, `(WARM_UP + repeats) × 3` times.
    """
    ways: dict[str, _Lookup] = {
        "native": OwnLookup(num_slots, width, kernels=True),
        "XLA": OwnLookup(num_slots, width, kernels=False),
        FBGEMM: FbgemmLookup(num_slots, width),
    }
    found = {name: LookupResult(num_slots, name, [], []) for name in ways}
    rounds = WARM_UP + repeats
    batches = _batches(num_slots, tokens, reads, width, rounds)
    for (number, order), batch in zip(in_turns(ways, rounds), batches, strict=True):
        for name in order:
            forward, backward = ways[name].step(*batch)
            if number >= WARM_UP:
                found[name].forward_ms.append(1e3 * forward)
                found[name].backward_ms.append(1e3 * backward)
            tick()
    return list(found.values())


def _batches(
    num_slots: int, tokens: int, reads: int, width: int, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield (
            rng.integers(0, num_slots, (tokens, reads), np.int32),
            rng.standard_normal((tokens, reads), np.float32),
            rng.standard_normal((tokens, width), np.float32),
        )
