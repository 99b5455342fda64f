"""Where memories sit: which layer feeds a memory and after which layer its output lands.

A placement reads `3:7/8:12`: one memory takes the normalised feed-forward input of layer 3 and adds its
output to the residual stream after layer 7, a second one spans layers 8 to 12. Layers count from 1, as in
the UltraMem paper. `full` puts one memory into every layer (`1:1/2:2/...`), `none` puts none anywhere.
"""

from typing import NamedTuple

from ultramem_jax.errors import UserError, require, whole_number


class Span(NamedTuple):
    """One memory: reads in layer `start`, lands after layer `end` (both count from 1)."""

    start: int
    end: int


def parse_placement(placement: str, num_layers: int, field: str = "placement") -> tuple[Span, ...]:
    """The memories of a placement string, in the order written.

    Args:
        placement: `full`, `none`, or spans `start:end` joined by `/`.
        num_layers: L, the layers of the Transformer.
        field: the name to use in an error.

    Raises:
        UserError: malformed, a span that lands before it starts, or one outside layers 1..L.
    """
    if placement == "none":
        return ()
    if placement == "full":
        return tuple(Span(layer, layer) for layer in range(1, num_layers + 1))
    spans = []
    for part in placement.split("/"):
        first, _, last = part.partition(":")
        start, end = whole_number(first), whole_number(last)
        if start is None or end is None:
            allowed = f"{part!r} is not a span; allowed are 'full', 'none' or spans like '3:7/8:12'"
            raise UserError(f"{field} = {placement!r}: {allowed}")
        span = Span(start, end)
        require(span.start >= 1, field, placement, f"span {part} starts before layer 1")
        require(span.start <= span.end, field, placement, f"span {part} lands before it starts")
        require(
            span.end <= num_layers,
            field,
            placement,
            f"span {part} lands beyond the last layer, {num_layers}",
        )
        spans.append(span)
    return tuple(spans)
