"""Compares ways of splitting a table by formulas: which one is cheaper, and from how many parts on.

Nothing is compiled. The formulas describe one forward lookup of one memory in four ways: the two ways of this
project, and the two of the UltraMem paper (arXiv 2411.12364), which brings rows to tokens by number, or
pooled slices by dimension. Every device has the same number of tokens for every P, as in a run where `data`
times `memory` stays the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ultramem_jax.accounting import exchange_bytes
from ultramem_jax.accounting.model import DTYPE_BYTES
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.planning.hardware import Hardware
from ultramem_jax.planning.step_time import access_bytes

WAYS = ("slots", "width", "paper_number_wise", "paper_dimension_wise")
"""Ways of splitting a table: fields of `ultramem_jax.accounting.Exchange`."""
TITLES = dict(zip(WAYS, ("slots", "width", "paper, by number", "paper, by dimension"), strict=True))
_BY_COLUMNS = ("width", "paper_dimension_wise")
"""Ways in which a device reads its columns of all rows that its group reads.

In the other ways a device reads whole rows, and only the rows that it owns.
"""


@dataclass(frozen=True)
class WayCost:
    """Holds the cost of one way with tables in P parts: one forward lookup of one memory, on one device."""

    sent: float
    """Bytes that the device sends."""
    read: float
    """Bytes of rows that the device's memory moves."""
    seconds: float
    """Seconds of sending and reading, one after the other."""


Costs = dict[int, dict[str, WayCost]]
"""Costs by P and way; a way is absent where P does not divide what it splits."""


def partition_costs(site: MemorySite, tokens: int, hardware: Hardware, most: int) -> Costs:
    """Returns the costs of the four ways for P = 2, 4, 8, ...

    Args:
        site: a memory of a model.
        tokens: tokens of one device.
        hardware: the device, of which all are alike.
        most: the largest P.
    """
    memory, table = site.config, site.config.table
    value, reads = DTYPE_BYTES[table.dtype], tokens * memory.reads_per_token
    widths = list(table.arrays.values())
    costs: Costs = {}
    parts = 2
    while parts <= most:
        exchange = exchange_bytes(site, tokens, parts)
        rate = hardware.node_link_bytes if parts <= hardware.devices_per_node else hardware.outer_link_bytes
        for way in WAYS:
            columns = parts if way in _BY_COLUMNS else 1
            split = widths if way in _BY_COLUMNS else [site.num_slots]
            if any(size % parts for size in split):
                continue
            of_read = sum(access_bytes(value * (width // columns), hardware.access_bytes) for width in widths)
            # By columns a device reads for its whole group, P times its own reads; by rows a P-th of that.
            read = float(reads * columns * of_read)
            sent: float = getattr(exchange, way)
            seconds = sent / rate + read / hardware.memory_bytes_per_second
            costs.setdefault(parts, {})[way] = WayCost(sent, read, seconds)
        parts *= 2
    return costs


def crossover(costs: Costs, way: str, other: str, key: Callable[[WayCost], float]) -> int | None:
    """Returns the least P from which on one way stays cheaper than another; None if there is none.

    Only those P count for which both ways exist.

    Args:
        costs: costs from `partition_costs`.
        way: the way that becomes cheaper.
        other: the way that it is compared with.
        key: the quantity that is compared.
    """
    first = None
    for parts, ways in costs.items():
        if way not in ways or other not in ways:
            continue
        cheaper = key(ways[way]) < key(ways[other])
        first = (first or parts) if cheaper else None
    return first


def verdict(costs: Costs) -> str:
    """Returns a sentence that says which way is cheapest from which P on, by bytes and by time."""
    sent = _runs(costs, lambda cost: cost.sent)
    seconds = _runs(costs, lambda cost: cost.seconds)
    ours = _runs(costs, lambda cost: cost.seconds, WAYS[:2])
    return (
        f"In this lookup only, forward, fewest bytes are sent {_in_words(sent)}; sending and reading take "
        f"least time {_in_words(seconds)}, and of our two ways {_in_words(ours)}. A step has more to send: "
        "see the tables above."
    )


def _runs(
    costs: Costs, key: Callable[[WayCost], float], among: Sequence[str] = WAYS
) -> list[tuple[str, int, int]]:
    """Returns ranges of P in which one way is cheapest: the way, the first P and the last P.

    The comparison ends where P does not divide what one of the ways splits.
    """
    possible = [way for way in among if any(way in ways for ways in costs.values())]
    runs: list[tuple[str, int, int]] = []
    for parts, ways in costs.items():
        if not possible or any(way not in ways for way in possible):
            break
        best = min(possible, key=lambda way: key(ways[way]))
        if runs and runs[-1][0] == best:
            runs[-1] = (best, runs[-1][1], parts)
        else:
            runs.append((best, parts, parts))
    return runs


def _in_words(runs: list[tuple[str, int, int]]) -> str:
    words = []
    for number, (way, first, last) in enumerate(runs):
        where = f"for P = {first} to {last}" if first < last else f"for P = {first}"
        where = f"from P = {first} on" if 0 < number == len(runs) - 1 else where
        words.append(f"by `{TITLES[way]}` {where}")
    return ", ".join(words) or "nowhere"
