"""What experiments time in turns: the order of the turns, and the ratio of two ways."""

import pytest

from experiments.common.timing import in_turns, times_as_fast


def test_every_contender_has_every_place_once():
    rounds = [(number, "".join(order)) for number, order in in_turns({"a": 1, "b": 2, "c": 3}, 4)]
    assert rounds == [(0, "abc"), (1, "bca"), (2, "cab"), (3, "abc")]


def test_the_ratio_is_the_median_over_rounds():
    assert times_as_fast([1.0, 2.0, 4.0], [2.0, 1.0, 12.0]) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        times_as_fast([1.0, 2.0], [1.0])
