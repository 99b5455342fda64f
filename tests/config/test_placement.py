"""Memories sit where a placement says."""

import pytest

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.placement import Span, parse_placement
from ultramem_jax.errors import UserError
from ultramem_jax.presets import families


def test_three_kinds_of_places():
    assert parse_placement("3:7/instead@6/before@2", 8) == (
        Span(3, 7),
        Span(6, 6, "instead"),
        Span(2, 2, "before"),
    )
    assert parse_placement("full", 3) == (Span(1, 1), Span(2, 2), Span(3, 3))
    assert parse_placement("none", 3) == ()


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("befor@2", "'befor@2' is not a span; allowed are 'full', 'none' or spans like '3:7'"),
        ("before@", "'before@' is not a span"),
        ("before@two", "'before@two' is not a span"),
        ("instead@0", "span instead@0 starts before layer 1"),
        ("before@9", "span before@9 lands beyond the last layer, 4"),
        ("instead@2/instead@2", "layer 2 has one feed-forward"),
        ("", "'' is not a span"),
    ],
)
def test_what_is_refused(placement, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_placement(placement, 4)
    assert "\n" not in str(caught.value)


def test_two_memories_cannot_stand_in_for_one_feed_forward():
    memory = families.ultramem(placement="instead@2", num_keys=8, top_m=4)
    with pytest.raises(UserError, match=r"instead@2, twice.*a layer has one feed-forward"):
        ModelConfig(memories={"one": memory, "two": memory})
    one = ModelConfig(memories={"one": memory})
    assert one.feed_forward_layers == (1, 3, 4)
