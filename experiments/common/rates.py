"""Chooses learning rates, and tries further ones where the best may lie beyond those that were given."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Result = TypeVar("Result")

_MOST_ADDED = 4
"""Rates that `tuned` adds at most."""


def at_an_end(best: float, tried: Iterable[float]) -> bool:
    """Tells whether the best of several rates is the lowest or the highest, so that others may be better."""
    rates = sorted(set(tried))
    return len(rates) > 1 and best in (rates[0], rates[-1])


def tuned(
    rates: Iterable[float],
    measure: Callable[[float], list[Result]],
    best: Callable[[Sequence[Result]], float],
) -> list[Result]:
    """Returns what is measured at several rates, and at further ones until the best lies between others.

    A further rate is as far from its neighbour as the two rates at that end are from each other. A single
    rate is taken as it is.

    Args:
        rates: the rates to begin with.
        measure: returns the results of a rate; none if it cannot be used.
        best: returns the best rate of some results, which may be none.
    """
    tried = sorted(set(rates))
    results = [result for rate in tried for result in measure(rate)]
    for _ in range(_MOST_ADDED):
        chosen = best(results)
        if not at_an_end(chosen, tried):
            break
        end, neighbour = (tried[0], tried[1]) if chosen == tried[0] else (tried[-1], tried[-2])
        further = float(f"{end * end / neighbour:.2g}")
        results += measure(further)
        tried = sorted([*tried, further])
    return results
