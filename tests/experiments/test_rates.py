"""Learning rates that are tried beyond those that were given."""

import pytest

from experiments.common.rates import at_an_end, tuned


def _tried(rates, optimum, unusable=()):
    """Tunes where a rate is the worse the farther it lies from the optimum, as a ratio."""

    def measure(rate):
        return [] if rate in unusable else [rate]

    def best(results):
        return min(results, key=lambda rate: max(rate / optimum, optimum / rate))

    return tuned(rates, measure, best)


@pytest.mark.parametrize(
    ("rates", "optimum", "expected"),
    [
        ((1e-3, 1e-2, 1e-1), 1e-2, [1e-3, 1e-2, 1e-1]),
        ((1e-3, 1e-2, 1e-1), 1e-4, [1e-3, 1e-2, 1e-1, 1e-4, 1e-5]),
        ((1e-3, 3e-3, 1e-2), 3e-4, [1e-3, 3e-3, 1e-2, 3.3e-4, 1.1e-4]),
        ((0.004, 0.008, 0.016), 0.03, [0.004, 0.008, 0.016, 0.032, 0.064]),
        ((2.0, 1.0), 1e9, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),  # four at most
        ((0.5,), 1e-4, [0.5]),
    ],
)
def test_rates_are_added_until_the_best_lies_between_others(rates, optimum, expected):
    assert _tried(rates, optimum) == expected


def test_a_rate_that_cannot_be_used_bounds_the_others():
    assert _tried((0.1, 0.2), 0.2, unusable=(0.4,)) == [0.1, 0.2]
    assert _tried((0.1, 0.2, 0.4), 0.2, unusable=(0.4,)) == [0.1, 0.2]


def test_ends_of_the_rates():
    assert at_an_end(1.0, (3.0, 1.0, 2.0)) and at_an_end(3.0, (3.0, 1.0, 2.0))
    assert not at_an_end(2.0, (3.0, 1.0, 2.0)) and not at_an_end(1.0, (1.0, 1.0))
