"""Times steps in turn: chooses steps that fit into host memory together, and measures what they take."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from ultramem_jax.tree_types import ArrayTree

T = TypeVar("T")

WARM_UP = 3
"""Rounds of warm-up, before the rounds that count."""


class Need(NamedTuple):
    """Holds the host memory that a step needs, in bytes, counted before anything is compiled."""

    state: int
    """Bytes of the state that the step keeps."""
    transient: int = 0
    """Bytes that the step needs beside its state while it runs."""


class Running(Protocol):
    """Runs steps one after the other."""

    state: ArrayTree
    """State that the next step starts from; None if nobody else needs it."""

    def step(self, batch: ArrayTree) -> None:
        """Runs a step, and returns when it is done."""

    def planned_bytes(self) -> tuple[int, int] | None:
        """Returns the bytes at the peak and those of temporaries, as planned; None if nobody plans them."""


class Contender(NamedTuple):
    """Describes a step that is timed."""

    start: Callable[[ArrayTree], Running]
    """Compiles the step for batches like the one given, and makes its state."""
    table_bytes: int
    need: Need


class Compiled:
    """Runs a compiled JAX step, whose state is donated."""

    def __init__(
        self,
        init: Callable[[], ArrayTree],
        step: Callable[[ArrayTree, ArrayTree], tuple[ArrayTree, ...]],
        batch: ArrayTree,
    ):
        """Compiles (state, batch) -> (state, any result) for batches like this one, and makes the state."""
        self._step = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(init), batch).compile()
        self.state: ArrayTree = jax.block_until_ready(jax.jit(init)())

    def step(self, batch: ArrayTree) -> None:
        """Runs a step, and returns when it is done."""
        self.state, _ = jax.block_until_ready(self._step(self.state, batch))

    def planned_bytes(self) -> tuple[int, int] | None:
        """Returns the bytes at the peak and those of temporaries, as the compiler planned them."""
        planned = self._step.memory_analysis()
        assert planned is not None, "the compiler gives no figures of memory"
        held = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
        return held + planned.temp_size_in_bytes, planned.temp_size_in_bytes


class Timing(NamedTuple):
    """Holds the measurements of a step."""

    ms: list[float]
    """Milliseconds of every step that counts."""
    peak_bytes: int | None
    """Bytes of arguments, results and temporaries together, as the compiler planned them; None without it."""
    temporary_bytes: int | None
    """Bytes of the temporaries among `peak_bytes`."""


def contender(
    init: Callable[[], ArrayTree],
    step: Callable[[ArrayTree, ArrayTree], tuple[ArrayTree, ...]],
    tables: Callable[[ArrayTree], ArrayTree],
    dense: bool,
) -> Contender:
    """Returns a step with the host memory that it needs.

    Args:
        init: returns the state at step 0; traceable.
        step: (state, batch) -> (state, any result).
        tables: function from the state to its tables.
        dense: whether the step makes a gradient of the size of the tables. The update from optax needs no
            room of its own: it is added to the table as it is made.
    """
    state = jax.eval_shape(init)
    of_tables = num_bytes(tables(state))
    need = Need(num_bytes(state), of_tables if dense else 0)
    return Contender(partial(Compiled, init, step), of_tables, need)


def num_bytes(tree: ArrayTree) -> int:
    """Returns the bytes of all arrays, or shapes of arrays, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def needed(needs: Sequence[Need]) -> int:
    """Returns the bytes of several steps whose states are kept together while one step runs at a time."""
    return sum(need.state for need in needs) + max((need.transient for need in needs), default=0)


def groups_that_fit(needs: Mapping[str, Need], limit: int | None) -> list[list[str]]:
    """Divides steps into groups that fit into host memory together, and makes groups as large as possible.

    Steps that do not fit on their own are left out. Among groups of the same size, the one with the first
    names is chosen.

    Args:
        needs: needs by name of the step.
        limit: bytes that a group must fit into; None if everything fits.

    Returns:
        Names of the steps, by group.
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
    draw: Callable[[int], ArrayTree],
    repeats: int,
    tick: Callable[[], object],
) -> tuple[dict[str, Timing], dict[str, ArrayTree]]:
    """Times steps in turn: a round runs each step once, all on the same new batch.

    Args:
        contenders: steps by name; their states are in host memory together.
        draw: function from the number of a round to its batch.
        repeats: rounds that count, after `WARM_UP` rounds.
        tick: function that is called after every step.

    Returns:
        The timings, and the states after the last step, by name.
    """
    batch = draw(0)
    running = {name: contender.start(batch) for name, contender in contenders.items()}
    ms: dict[str, list[float]] = {name: [] for name in contenders}
    for number, order in in_turns(contenders, WARM_UP + repeats):
        batch = jax.block_until_ready(draw(number))
        for name in order:
            start = time.perf_counter()
            running[name].step(batch)
            if number >= WARM_UP:
                ms[name].append(1e3 * (time.perf_counter() - start))
            tick()
    timings = {
        name: Timing(ms[name], *(run.planned_bytes() or (None, None))) for name, run in running.items()
    }
    return timings, {name: run.state for name, run in running.items()}


def in_turns(contenders: Iterable[T], rounds: int) -> Iterator[tuple[int, list[T]]]:
    """Yields the number of each round, and the order in which contenders take their turns in it.

    The order rotates: none always runs after the same other one and gains from what that left in the cache.
    """
    order = list(contenders)
    for number in range(rounds):
        yield number, order
        order = order[1:] + order[:1]


def times_as_fast(times: Sequence[float], other: Sequence[float]) -> float:
    """Returns how many times as fast the first is as the other: the median of the ratios of a round."""
    return statistics.median(theirs / ours for ours, theirs in zip(times, other, strict=True))


def spread(ms: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, the 10th and the 90th percentile."""
    low, median, high = np.percentile(ms, [10, 50, 90])
    return float(median), float(low), float(high)
