"""Times the parts of a memory layer's step, each compiled by itself."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_step.memory_step import Batch, MemoryLayer, Way
from experiments.common.timing import WARM_UP
from ultramem_jax.ops.hashing import mix
from ultramem_jax.ops.key_scores import best_keys, combined_scores, key_scores
from ultramem_jax.ops.linear import project
from ultramem_jax.ops.lookup import RowsRead, pooled_lookup
from ultramem_jax.ops.product_keys import retrieve_tucker
from ultramem_jax.ops.topk import top_k
from ultramem_jax.training.module_step import Pass
from ultramem_jax.training.row_sparse import update_by_reads
from ultramem_jax.training.state import TrainState, model_variables
from ultramem_jax.training.table_gradients import rows_of_tables, table_gradients
from ultramem_jax.tree_types import ArrayTree


class Part(NamedTuple):
    """Describes one line of the breakdown."""

    name: str
    series: str
    """Series of times that the line shows, a key of `PartTimes.ms`."""
    less: tuple[str, ...] = ()
    """Series that are subtracted from it, round by round."""
    costs: tuple[str, ...] = ()
    """Names of its floors in `memory_step_costs`, which are added; none for no floor."""
    in_sum: bool = True
    """True if the step does this and no other line includes it."""


PARTS = (
    Part("query", "query", costs=("query",)),
    Part("norm of the keys", "key norm"),
    Part("choice of candidates", "choice", costs=("side_scores",)),
    Part("· side scores, alone", "side scores", costs=("side_scores",), in_sum=False),
    Part("· side top-k, alone", "side top-k", in_sum=False),
    Part("· jax.lax.top_k in its place", "lax top-k", in_sum=False),
    Part("scores of the candidates", "candidates", costs=("candidates",)),
    Part("grid (retrieval - the two above)", "retrieval", ("choice", "candidates"), ("grid",)),
    Part("lookup", "lookup", costs=("lookup",)),
    Part("projection", "projection", costs=("projection",)),
    Part("backward (with forward - forward)", "gradients", ("forward",), ("backward",)),
    Part("sort of the reads", "sort"),
    Part("row gradients and update", "row update", costs=("row_gradients", "row_update")),
    Part("dense optimizer", "dense optimizer", costs=("dense_optimizer",)),
)


class PartTimes(NamedTuple):
    """Holds what was measured of the parts of one step."""

    ms: dict[str, list[float]]
    """Milliseconds of every round that counts, by series."""
    rows: list[int]
    """Distinct rows that were read, in every such round."""

    def of(self, part: Part) -> list[float]:
        """Returns the milliseconds of a part, round by round."""
        less = [self.ms[series] for series in part.less]
        return [all_of - math.fsum(taken) for all_of, *taken in zip(self.ms[part.series], *less, strict=True)]


def time_parts(
    layer: MemoryLayer,
    way: Way,
    state: TrainState,
    draw: Callable[[int], Batch],
    repeats: int,
    tick: Callable[[], object],
) -> PartTimes:
    """Times the parts of row-sparse steps in turn, and updates the state as in training.

    Forward and gradients take batches of their own, so that no part finds rows in the CPU's cache that it
    would not find there in a step.

    Args:
        layer: a layer that is trained by rows.
        way: the way of its config, which says whether native kernels compute.
        state: its state, which is donated.
        draw: makes a batch of a number.
        repeats: rounds that count.
        tick: called after every round.
    """
    site = layer.site
    parts, top_m = _Parts(layer, way), layer.site.config.value_of("top_m")
    ms: dict[str, list[float]] = {}
    rows = []

    def timed(series: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        ms.setdefault(series, []).append(1e3 * (time.perf_counter() - start))
        return result

    for number in range(WARM_UP + repeats):
        first, forward, trained = (jax.block_until_ready(draw(3 * number + i)) for i in range(3))
        left = jax.block_until_ready(parts.left(state, first.x))
        queries = timed("query", parts.queries, state, first.x)
        keys = timed("key norm", parts.keys, state, first.x)
        (cores, directions), reads = left["core"], left["reads"]
        scores = timed("side scores", parts.scores, queries, keys, directions)
        timed("side top-k", parts.top_k, scores, top_m)
        timed("lax top-k", parts.lax_top_k, scores, top_m)
        del scores
        index = timed("choice", parts.best_keys, queries, keys, directions, top_m)
        timed("candidates", parts.key_scores, queries, keys, index)
        timed("retrieval", parts.retrieve, queries, keys, cores, directions, top_m)
        of_reads = reads["slots"], reads["blocks"], reads["weights"]
        table, params = state.tables[site.table]["values"], state.params[site.name]
        pooled = timed("lookup", parts.lookup, table, *of_reads, site.config.num_blocks)
        timed("projection", parts.project, pooled.reshape(len(pooled), -1), params["projection"])
        del table, params
        timed("forward", parts.forward, state, forward)
        found = timed("gradients", parts.gradients, state, trained)
        of_tables = timed("sort", parts.sort, found.reads)
        rows.append(int(np.sum(np.asarray(of_tables[site.table].slots) < site.num_slots)))
        left = found.reads, found.cotangents
        tables, table_state = timed(
            "row update", parts.update_rows, of_tables, left, state.tables, state.table_state, state.step
        )
        params, opt_state = timed(
            "dense optimizer", parts.update_params, found.gradients["params"], state.opt_state, state.params
        )
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            tables=tables,
            table_state=table_state,
            buffers=found.buffers,
        )
        tick()
    return PartTimes({series: values[WARM_UP:] for series, values in ms.items()}, rows[WARM_UP:])


class _Parts:
    """Compiles the parts."""

    def __init__(self, layer: MemoryLayer, way: Way):
        def compiled(function: Callable[..., Any], **options: Any) -> Any:
            return jax.jit(way.traced(function), **options)

        # The forward pass returns what lies between its parts. The compiler drops what no result needs.
        self.left = compiled(lambda state, x: _left(layer, state, x, ("core",)))
        self.queries = compiled(lambda state, x: _left(layer, state, x, ("queries",))["queries"])
        self.keys = compiled(lambda state, x: _left(layer, state, x, ("keys",))["keys"])
        self.scores = compiled(combined_scores)
        self.top_k = compiled(top_k, static_argnums=1)
        self.lax_top_k = compiled(jax.lax.top_k, static_argnums=1)
        self.best_keys = compiled(best_keys, static_argnums=3)
        self.key_scores = compiled(key_scores)
        self.retrieve = compiled(retrieve_tucker, static_argnums=4)
        self.lookup = compiled(pooled_lookup, static_argnums=4)
        self.project = compiled(project)
        self.forward = compiled(partial(_forward, layer))
        self.gradients = compiled(partial(_gradients, layer))
        self.sort = compiled(partial(rows_of_tables, layer.config.model))
        self.update_rows = compiled(partial(_update_rows, layer), donate_argnums=(2, 3))
        self.update_params = compiled(layer.training.update_params, donate_argnums=(1, 2))


def _forward(layer: MemoryLayer, state: TrainState, batch: Batch) -> ArrayTree:
    point = layer.training.point(state, batch)
    return layer.training.loss(point, state, state.buffers, batch, jax.random.key(0))


def _gradients(layer: MemoryLayer, state: TrainState, batch: Batch) -> Pass:
    return layer.training.differentiate(state, state.buffers, batch, jax.random.key(0))


def _update_rows(
    layer: MemoryLayer,
    rows: dict[str, RowsRead],
    left: tuple[ArrayTree, ArrayTree],
    tables: ArrayTree,
    moments: ArrayTree,
    step: jax.Array,
) -> tuple[ArrayTree, ArrayTree]:
    name, seed = layer.site.table, mix(step.astype(jnp.uint32), jnp.uint32(0))
    of_reads = table_gradients(layer.config.model, rows, *left)[name]["values"]
    update = update_by_reads(
        layer.optimizers.rows[name], of_reads, moments[name]["values"], tables[name]["values"], step, seed
    )
    return {name: {"values": update.table}}, {name: {"values": update.moments}}


def _left(
    layer: MemoryLayer, state: TrainState, x: jax.Array, methods: Sequence[str]
) -> dict[str, ArrayTree]:
    """Returns what a forward pass leaves: results of the addresser's methods by their names, and `reads`."""
    _, left = layer.module.apply(
        model_variables(state),
        x,
        train=True,
        mutable=["reads", "buffers", "intermediates"],
        capture_intermediates=lambda _, method: method in methods,
    )
    name = layer.site.name
    captured = {method: left["intermediates"][name][method][0] for method in methods}
    return captured | {"reads": left["reads"][name]}
