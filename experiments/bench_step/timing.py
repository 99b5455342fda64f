"""Steps timed in turn: which of them fit into memory together, their times, and what they hold at most."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

WARM_UP = 3
"""Rounds before those that count."""


class Need(NamedTuple):
    """Memory of a step, in bytes, counted before anything is compiled."""

    state: int
    """What it keeps."""
    transient: int = 0
    """What it makes beside that while it runs."""


class Contender(NamedTuple):
    """A step that is timed."""

    init: Callable[[], Any]
    """The state at step 0; traceable."""
    step: Callable[..., Any]
    """(state, batch) -> (state, something); compiled with the state donated."""
    table_bytes: int
    need: Need


class Timing(NamedTuple):
    """What was measured of a step."""

    ms: list[float]
    """Of every step that counts."""
    peak_bytes: int
    """Arguments, results and temporaries at once, as the compiler planned them."""
    temporary_bytes: int
    """The temporaries among them."""


def contender(
    init: Callable[[], Any], step: Callable[[Any, Any], Any], tables: Any, dense: bool
) -> Contender:
    """A step with its need of memory.

    Args:
        init: as in `Contender`.
        step: as in `Contender`.
        tables: from the state to its tables.
        dense: whether the step makes a gradient of the tables' size. (The change that optax makes of it is
            added to the table as it is made.)
    """
    state = jax.eval_shape(init)
    of_tables = num_bytes(tables(state))
    return Contender(init, step, of_tables, Need(num_bytes(state), of_tables if dense else 0))


def num_bytes(tree: Any) -> int:
    """Of all arrays, or shapes of arrays, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def needed(needs: Sequence[Need]) -> int:
    """Bytes of steps whose states are kept side by side and of which one runs at a time."""
    return sum(need.state for need in needs) + max((need.transient for need in needs), default=0)


def groups_that_fit(needs: Mapping[str, Need], limit: int | None) -> list[list[str]]:
    """Steps in groups that fit into memory together, as large as possible; those that fit nowhere left out.

    Args:
        needs: by name.
        limit: bytes; None: everything fits.

    Returns:
        Names; of groups of one size, the one with the names that come first.
    """
    left = [name for name in needs if limit is None or needed([needs[name]]) <= limit]
    groups = []
    while left:
        group = next(
            list(names)
            for size in range(len(left), 0, -1)
            for names in itertools.combinations(left, size)
            if limit is None or needed([needs[name] for name in names]) <= limit
        )
        groups.append(group)
        left = [name for name in left if name not in group]
    return groups


def race(
    contenders: Mapping[str, Contender],
    draw: Callable[[int], Any],
    repeats: int,
    tick: Callable[[], object],
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Times steps in turn, one of each per round, all of a round on the same new batch.

    Args:
        contenders: by name; their states are in memory together.
        draw: from the number of a round to its batch.
        repeats: rounds that count, after `WARM_UP`.
        tick: called after every step.

    Returns:
        Timings and the states after the last step, by name.
    """
    batch = draw(0)
    compiled = {
        name: jax.jit(c.step, donate_argnums=0).lower(jax.eval_shape(c.init), batch).compile()
        for name, c in contenders.items()
    }
    states = {name: jax.block_until_ready(jax.jit(c.init)()) for name, c in contenders.items()}
    ms: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(WARM_UP + repeats):
        batch = jax.block_until_ready(draw(number))
        for name in order:
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(compiled[name](states[name], batch))
            if number >= WARM_UP:
                ms[name].append(1e3 * (time.perf_counter() - start))
            tick()
        # Each follows each other one: what a step leaves in the cache is not always the same step's gain.
        order = order[1:] + order[:1]
    return {name: Timing(ms[name], *_planned(compiled[name])) for name in contenders}, states


def spread(ms: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(ms, [10, 50, 90])
    return float(median), float(low), float(high)


def _planned(compiled: Any) -> tuple[int, int]:
    """Bytes at the peak and of temporaries."""
    planned = compiled.memory_analysis()
    held = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
    return held + planned.temp_size_in_bytes, planned.temp_size_in_bytes
