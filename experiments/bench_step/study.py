"""Measures one size of the table for `bench_step`: a memory layer, or a small model with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench_step.memory_step import SEQUENCES, WAYS, MemoryLayer, bench_config
from experiments.bench_step.parts import PartTimes, time_parts
from experiments.bench_step.timing import Contender, Timing, contender, groups_that_fit, needed, race
from ultramem_jax.accounting import PartCost
from ultramem_jax.accounting.step_costs import memory_step_costs, model_step_cost, total
from ultramem_jax.config import RunConfig
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.state import init_state
from ultramem_jax.training.step import make_train_step


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
    dissected: str | None
    """Way whose parts are timed, too; None if none fits, or for the model."""
    draw: Callable[[int], Any]
    """Function from a number to a batch."""

    @property
    def rounds(self) -> int:
        """Returns the steps to time per round; the parts count as one step."""
        return sum(len(group) for group in self.groups) + (self.dissected is not None)


def plan(num_keys: int, tokens: int, limit: int | None, *, model: bool) -> Size:
    """Returns what to time at one size.

    Args:
        num_keys: n; the table has n² slots.
        tokens: T of a step.
        limit: bytes that may be used; None is no limit.
        model: whether to time the whole model, without parts, instead of the layer.
    """
    configs = {name: bench_config(num_keys, way, tokens) for name, way in WAYS.items()}
    build = _of_model if model else _of_layer
    contenders = {name: build(config) for name, config in configs.items()}
    groups = groups_that_fit({name: c.need for name, c in contenders.items()}, limit)
    # Parts are timed of the first way that fits and trains by rows.
    by_rows = [name for name, way in WAYS.items() if way.table_gradient == "row_sparse"]
    fitting = [name for name in by_rows if any(name in group for group in groups)]
    first = next(iter(configs.values()))
    return Size(
        num_keys=num_keys,
        configs=configs,
        contenders=contenders,
        groups=groups,
        costs={
            name: model_step_cost(config, tokens) if model else total(memory_step_costs(config, tokens))
            for name, config in configs.items()
        },
        dissected=fitting[0] if fitting and not model else None,
        draw=_draw_tokens(first) if model else _draw_inputs(first, tokens),
    )


def measure(
    size: Size, tokens: int, repeats: int, tick: Callable[[], object]
) -> tuple[list[StepResult], PartsResult | None]:
    """Times the steps of one size and, for the layer, the parts of one of them.

    Args:
        size: what to time, from `plan`.
        tokens: T of a step.
        repeats: steps that count.
        tick: called `(WARM_UP + repeats) · size.rounds` times.
    """
    timings: dict[str, Timing] = {}
    beside: dict[str, tuple[str, ...]] = {}
    parts, slots = None, size.num_keys**2
    for group in size.groups:
        timed, states = race({name: size.contenders[name] for name in group}, size.draw, repeats, tick)
        timings |= timed
        beside |= {name: tuple(other for other in group if other != name) for name in group}
        # The next group needs the memory of these states. The arrays of the dissected one are donated.
        state = states.pop(size.dissected, None) if size.dissected else None
        states.clear()
        if size.dissected and state is not None:
            config = size.configs[size.dissected]
            times = time_parts(MemoryLayer(config), state, size.draw, repeats, tick)
            parts = PartsResult(slots, size.dissected, memory_step_costs(config, tokens), times)
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


def _of_layer(config: RunConfig) -> Contender:
    layer = MemoryLayer(config)
    return contender(layer.init, layer.step, lambda state: state.tables, dense=layer.is_dense)


def _of_model(config: RunConfig) -> Contender:
    optimizers = make_optimizers(config)
    return contender(
        lambda: init_state(config, optimizers),
        make_train_step(config, optimizers),
        lambda state: state.tables,
        dense=config.train.table_gradient == "dense",
    )


def _draw_inputs(config: RunConfig, tokens: int) -> Callable[[int], Any]:
    layer = MemoryLayer(config)
    return jax.jit(lambda number: layer.draw(jax.random.fold_in(jax.random.key(1), number), tokens))


def _draw_tokens(config: RunConfig) -> Callable[[int], Any]:
    shape, vocabulary = (SEQUENCES, config.data.seq_len + 1), config.model.vocab_size

    def draw(number: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(1), number)
        return jax.random.randint(key, shape, 0, vocabulary, jnp.int32)

    return jax.jit(draw)
