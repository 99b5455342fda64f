"""Measures one size of the table for `bench_step`: a memory layer, or a small model with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.bench_step.authors import AuthorsLayer, state_bytes
from experiments.bench_step.memory_step import (
    WAYS,
    XLA_OF,
    Batch,
    MemoryLayer,
    Way,
    bench_config,
    bench_memory,
)
from experiments.bench_step.parts import PartTimes, time_parts
from experiments.common.model_steps import draw_tokens, model_contender
from experiments.common.timing import (
    Contender,
    Need,
    Timing,
    contender,
    groups_that_fit,
    needed,
    race,
)
from ultramem_jax.accounting import PartCost
from ultramem_jax.accounting.step_costs import memory_step_costs, model_step_cost, total
from ultramem_jax.config import RunConfig

AUTHORS = "authors, PyTorch"
"""Name of the authors' layer among the ways."""


@dataclass(frozen=True)
class StepResult:
    """Holds the measured step of one way at one size."""

    slots: int
    way: str
    table_bytes: int
    need_bytes: int
    """Bytes of state and temporaries, as counted beforehand."""
    cost: PartCost
    timing: Timing | None
    """Measured times; None if the step did not fit into host memory."""
    beside: tuple[str, ...] = ()
    """Ways that it was timed in turns with."""


@dataclass(frozen=True)
class PartsResult:
    """Holds the measured parts of the layer's step at one size."""

    slots: int
    way: str
    costs: dict[str, PartCost]
    times: PartTimes


@dataclass(frozen=True)
class Size:
    """Describes what is timed at one size of the table."""

    num_keys: int
    configs: dict[str, RunConfig]
    contenders: dict[str, Contender]
    groups: list[list[str]]
    """Ways that fit into host memory, in groups that fit together."""
    costs: dict[str, PartCost]
    """Floor of the whole step, by way."""
    dissected: tuple[str, ...]
    """Ways whose parts are timed, too; none for the model."""
    draw: Callable[[int], Any]
    """Function from a number to a batch."""

    @property
    def rounds(self) -> int:
        """Returns the steps to time per round; the parts count as one step."""
        return sum(len(group) for group in self.groups) + len(self.dissected)


def plan(num_keys: int, tokens: int, limit: int | None, *, model: bool, authors: str | None = None) -> Size:
    """Returns what to time at one size.

    Args:
        num_keys: n; the table has n² slots.
        tokens: T of a step.
        limit: bytes that may be used; None is no limit.
        model: whether to time the whole model, without parts, instead of the layer.
        authors: folder of the authors' code, whose layer is timed too; None leaves it out.
    """
    configs = {name: bench_config(num_keys, way, tokens) for name, way in WAYS.items()}
    build = _of_model if model else _of_layer
    contenders = {name: build(config, WAYS[name]) for name, config in configs.items()}
    costs = {
        name: model_step_cost(config, tokens) if model else total(memory_step_costs(config, tokens))
        for name, config in configs.items()
    }
    if authors is not None and not model:
        contenders[AUTHORS], costs[AUTHORS] = _of_authors(authors, num_keys, tokens), costs["dense"]
    groups = groups_that_fit({name: c.need for name, c in contenders.items()}, limit)
    fitting = [name for group in groups for name in group]
    # Parts are timed of the first way with kernels that fits, and of the same without them.
    dissected = next(((name, XLA_OF[name]) for name in XLA_OF if name in fitting), ())
    first = next(iter(configs.values()))
    return Size(
        num_keys=num_keys,
        configs=configs,
        contenders=contenders,
        groups=groups,
        costs=costs,
        dissected=() if model else tuple(name for name in dissected if name in fitting),
        draw=draw_tokens(first) if model else _draw_inputs(first, tokens),
    )


def measure(
    size: Size, tokens: int, repeats: int, tick: Callable[[], object]
) -> tuple[list[StepResult], list[PartsResult]]:
    """Times the steps of one size and, for the layer, the parts of some of them.

    Args:
        size: what to time, from `plan`.
        tokens: T of a step.
        repeats: steps that count.
        tick: called `(WARM_UP + repeats) · size.rounds` times.
    """
    timings: dict[str, Timing] = {}
    beside: dict[str, tuple[str, ...]] = {}
    parts, slots = [], size.num_keys**2
    for group in size.groups:
        timed, states = race({name: size.contenders[name] for name in group}, size.draw, repeats, tick)
        timings |= timed
        beside |= {name: tuple(other for other in group if other != name) for name in group}
        for name in [name for name in size.dissected if name in group]:
            # The next group needs the memory of these states: the arrays of this one are donated.
            state, way, config = states.pop(name), WAYS[name], size.configs[name]
            for other in [other for other in states if other not in size.dissected]:
                del states[other]
            times = time_parts(MemoryLayer(config), way, state, size.draw, repeats, tick)
            parts.append(PartsResult(slots, name, memory_step_costs(config, tokens), times))
            del state
        states.clear()
    steps = [
        StepResult(
            slots=slots,
            way=name,
            table_bytes=c.table_bytes,
            need_bytes=needed([c.need]),
            cost=size.costs[name],
            timing=timings.get(name),
            beside=beside.get(name, ()),
        )
        for name, c in size.contenders.items()
    ]
    return steps, parts


def _of_layer(config: RunConfig, way: Way) -> Contender:
    layer = MemoryLayer(config)
    return contender(layer.init, way.traced(layer.step), lambda state: state.tables, dense=way.is_dense)


def _of_model(config: RunConfig, way: Way) -> Contender:
    return model_contender(config, kernels=way.kernels, dense=way.is_dense)


class _RunningAuthors:
    """Runs the authors' layer."""

    state = None

    def __init__(self, layer: AuthorsLayer):
        self._layer = layer

    def step(self, batch: Batch) -> None:
        self._layer.step(np.asarray(batch.x), np.asarray(batch.target))

    def planned_bytes(self) -> None:
        return None


def _of_authors(checkout: str, num_keys: int, tokens: int) -> Contender:
    table = num_keys**2 * bench_memory(num_keys, WAYS["dense"]).table.value_dim * 4
    need = Need(state_bytes(num_keys))
    return Contender(lambda batch: _RunningAuthors(AuthorsLayer(checkout, num_keys, tokens)), table, need)


def _draw_inputs(config: RunConfig, tokens: int) -> Callable[[int], Any]:
    layer = MemoryLayer(config)
    return jax.jit(lambda number: layer.draw(jax.random.fold_in(jax.random.key(1), number), tokens))
