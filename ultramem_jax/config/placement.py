"""Parses placements, which say which layer feeds a memory and where its output is added.

A placement lists memories, joined by `/`. There are three kinds:

- `3:7`, beside the layers: the memory takes the normalised feed-forward input of layer 3 and adds its output
  to the residual stream after layer 7. No layer in between waits for it (UltraMem).
- `instead@6`: the memory replaces the feed-forward of layer 6 (as PKM and Memory+ were published).
- `before@2`: the memory takes the residual stream before attention of layer 2, and adds to it there (Engram).

Layers count from 1, as in the UltraMem paper. `full` puts one memory beside every layer (`1:1/2:2/...`).
`none` places no memory.
"""

from typing import Literal, NamedTuple

from ultramem_jax.errors import UserError, require, whole_number

_POINTS = ("before", "instead")
_ALLOWED = "allowed are 'full', 'none' or spans like '3:7', 'instead@6' and 'before@2', joined by '/'"


class Span(NamedTuple):
    """Places one memory, which reads in layer `start` and adds its output in or after layer `end`, from 1."""

    start: int
    """Layer, from 1, in which the memory reads."""
    end: int
    """Layer, from 1, in or after which the memory adds its output."""
    place: Literal["beside", "instead", "before"] = "beside"
    """Kind of the place: beside the layers, instead of a feed-forward, or before attention."""


def parse_placement(placement: str, num_layers: int, field: str = "placement") -> tuple[Span, ...]:
    """Returns the places of all memories in a placement string, in their order.

    Args:
        placement: `full`, `none`, or memories joined by `/`.
        num_layers: L, the layers of the Transformer.
        field: the name of the field, for errors.

    Raises:
        UserError: a malformed string, a span that ends before it starts, a span outside layers 1..L, or two
            memories in place of one feed-forward.
    """
    if placement == "none":
        return ()
    if placement == "full":
        return tuple(Span(layer, layer) for layer in range(1, num_layers + 1))
    spans: list[Span] = []
    for part in placement.split("/"):
        span = _span(part)
        if span is None:
            raise UserError(f"{field} = {placement!r}: {part!r} is not a span; {_ALLOWED}")
        require(span.start >= 1, field, placement, f"span {part} starts before layer 1")
        require(span.start <= span.end, field, placement, f"span {part} lands before it starts")
        require(
            span.end <= num_layers,
            field,
            placement,
            f"span {part} lands beyond the last layer, {num_layers}",
        )
        twice = span.place == "instead" and span in spans
        require(not twice, field, placement, f"layer {span.start} has one feed-forward to stand in for")
        spans.append(span)
    return tuple(spans)


def _span(part: str) -> Span | None:
    """Returns the place of one memory from its text in a placement, or None for any other text."""
    point, at, layer = part.partition("@")
    if at:
        number = whole_number(layer)
        if point not in _POINTS or number is None:
            return None
        return Span(number, number, "before" if point == "before" else "instead")
    first, _, last = part.partition(":")
    start, end = whole_number(first), whole_number(last)
    return None if start is None or end is None else Span(start, end)
