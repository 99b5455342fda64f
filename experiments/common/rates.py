"""Looks at the learning rates among which an experiment has chosen."""

from collections.abc import Iterable


def at_an_end(best: float, tried: Iterable[float]) -> bool:
    """Tells whether the best of several rates is the lowest or the highest, so that others may be better."""
    rates = sorted(set(tried))
    return len(rates) > 1 and best in (rates[0], rates[-1])
