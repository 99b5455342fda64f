"""Tables in Markdown are aligned, and their numbers can be read."""

import pytest

from ultramem_jax.reporting import markdown


def test_columns_to_the_left_are_those_of_words_or_those_asked_for():
    rows = [{"model": "a", "size": "1.5 M"}, {"model": "long", "size": "12 M"}]
    assert markdown.table(rows, left=["model"]).splitlines()[1:] == [
        "| :---- | ----: |",
        "| a     | 1.5 M |",
        "| long  |  12 M |",
    ]
    assert markdown.table(rows).splitlines()[1] == "| :---- | :---- |"


def test_a_column_of_single_characters_has_a_rule():
    assert markdown.table([{"n": 2, "x": "a"}]) == "|  n | x  |\n| -: | :- |\n|  2 | a  |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12345.678, "12,346"),
        (1.5, "1.500"),
        (99.996, "100.00"),
        (-0.05, "-0.05000"),
        (3.2e9, "3.200e+09"),
        (float("inf"), "inf"),
    ],
)
def test_four_significant_digits(value, text):
    assert markdown.significant(value, 4) == text
