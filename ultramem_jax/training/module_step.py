"""Trains any Flax module that reads tables: one step, in stages, over an objective of the caller's choice.

The objective is differentiated with respect to the dense parameters and to the pooled reads of every memory,
not to the tables. The reads that were sown and the cotangents of the pooled sums give the gradients of the
rows that were read (`table_gradients`). The tables' optimizer touches only these rows: no array of a table's
size exists in the compiled step besides the donated tables and moments themselves.

`training.step` makes the step of a language model of it; a benchmark can make that of a single memory.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.config import RunConfig
from ultramem_jax.ops.on_mesh import MeshAxes, constrain_tokens, on_mesh
from ultramem_jax.training.dense_optimizer import Optimizers
from ultramem_jax.training.prefetch import Prefetched, are_read, gather_ahead, with_rows_written
from ultramem_jax.training.slot_selection import selection_of
from ultramem_jax.training.state import TrainState, model_variables
from ultramem_jax.training.table_gradients import ArraysOfMemories, perturbations
from ultramem_jax.training.table_updates import record_usage, update_tables
from ultramem_jax.training.trainable import overlaid, selected
from ultramem_jax.training.undo_log import RowsOverwritten
from ultramem_jax.tree_types import ArrayTree, Variables

Metrics: TypeAlias = dict[str, jax.Array]
"""Float32 scalars () by name."""


class Objective(NamedTuple):
    """Describes what a step minimizes, over a module whose memories have the names of a model's sites."""

    loss: Callable[[Variables, ArrayTree, ArrayTree, jax.Array], tuple[jax.Array, tuple[Variables, Metrics]]]
    """(variables, inputs, batch, random key) -> (scalar, (sown collections, metrics)). The collections have
    `reads` and `buffers`, the metrics `loss`, a float32 scalar."""
    num_tokens: Callable[[ArrayTree], int]
    """Batch -> T, the tokens that it reads memories for."""
    inputs: Callable[[ArrayTree], ArrayTree] = lambda batch: {}
    """Batch -> the arrays of it that the objective is also differentiated by, for a module whose input has
    a gradient in the model around it. Micro-batches do not support it."""


class StepOutcome(NamedTuple):
    """Holds what a step leaves."""

    state: TrainState
    metrics: Metrics
    before: RowsOverwritten | None
    """`TableUpdate.before`; None unless it was asked for."""
    input_gradients: ArrayTree
    """Gradients by `Objective.inputs`."""
    ahead: Prefetched | None
    """Rows of the next batch; None unless they were asked for."""


class Pass(NamedTuple):
    """Holds what a forward and a backward pass leave; on the whole batch, means over micro-batches."""

    gradients: dict[str, ArrayTree]
    """Gradients by `params`, by `inputs` if there are any, and by `memory` in the dense way."""
    cotangents: ArraysOfMemories
    """Gradients by the pooled reads; of the whole batch, behind an axis of micro-batches."""
    reads: ArraysOfMemories
    """Arrays that the memories sowed into `reads`; of the whole batch, behind an axis of micro-batches."""
    buffers: ArrayTree
    metrics: Metrics


class ModuleStep:
    """Makes one training step of a module, and its stages; methods are pure functions, to be compiled."""

    def __init__(
        self,
        config: RunConfig,
        optimizers: Optimizers,
        objective: Objective,
        record_before: bool = False,
        axes: MeshAxes | None = None,
    ):
        """Prepares a step.

        Args:
            config: the run's config; of its model, only the memories are used.
            optimizers: the result of `make_optimizers`.
            objective: what is minimized.
            record_before: whether to record the rows as they were; not in the dense way, and on one device.
            axes: the axes of the mesh; None for one device.
        """
        self._config, self._optimizers, self._objective = config, optimizers, objective
        self._record_before, self._axes = record_before, axes
        self._is_dense = config.train.table_gradient == "dense"

    def __call__(
        self,
        state: TrainState,
        batch: ArrayTree,
        halted: jax.Array | None = None,
        ahead: tuple[Prefetched, dict[str, jax.Array]] | None = None,
    ) -> StepOutcome:
        """Returns the state after one step, and what it leaves.

        Args:
            state: the state, which should be donated.
            batch: arrays with sequences along their first axis.
            halted: () bool; where it is True, no row is written. None is False.
            ahead: rows of this batch that were gathered ahead, and the slots of the next batch, whose rows
                the outcome has (`training.prefetch`); None if every memory gathers its own.

        Raises:
            ValueError: the objective has inputs, and there are several micro-batches.
        """
        with on_mesh(self._axes):
            return self._step(state, batch, halted, ahead)

    def point(self, state: TrainState, batch: ArrayTree) -> dict[str, ArrayTree]:
        """Returns the point at which `loss` is differentiated."""
        inputs = self._objective.inputs(batch)
        point = self._learning(state) | ({"inputs": inputs} if jax.tree.leaves(inputs) else {})
        if self._is_dense:
            return point
        learning = [table for table, parts in state.table_state.items() if parts]
        zeros = perturbations(self._config.model, self._objective.num_tokens(batch), learning)
        return point | {"perturbations": zeros}

    def _learning(self, state: TrainState) -> dict[str, ArrayTree]:
        """Returns the parameters that learn, and in the dense way also the tables, by collection."""
        pattern = self._config.train.trainable
        trees = {"params": state.params} | ({"memory": state.tables} if self._is_dense else {})
        return {name: selected(tree, pattern) for name, tree in trees.items()}

    def loss(
        self,
        point: dict[str, ArrayTree],
        state: TrainState,
        buffers: ArrayTree,
        batch: ArrayTree,
        key: jax.Array,
        rows: Prefetched | None = None,
    ) -> tuple[jax.Array, tuple[Variables, Metrics]]:
        """Returns the objective at a point of `point`, and what it leaves; `rows` were gathered ahead."""
        held = model_variables(state)
        learning = {name: point[name] for name in ("params", "memory") if name in point}
        variables = held | {"buffers": buffers} | point
        variables |= {name: overlaid(held[name], tree) for name, tree in learning.items()}
        if rows is not None:
            variables["prefetched"] = rows
        inputs = variables.pop("inputs", {})
        return self._objective.loss(variables, inputs, batch, key)

    def differentiate(
        self,
        state: TrainState,
        buffers: ArrayTree,
        batch: ArrayTree,
        key: jax.Array,
        rows: Prefetched | None = None,
    ) -> Pass:
        """Returns the gradients of one micro-batch, and what its forward pass leaves."""
        gradients, (sown, metrics) = jax.grad(self.loss, has_aux=True)(
            self.point(state, batch), state, buffers, batch, key, rows
        )
        cotangents = gradients.pop("perturbations", {})
        return Pass(gradients, cotangents, sown.get("reads", {}), sown.get("buffers", {}), metrics)

    def accumulate(
        self, state: TrainState, batch: ArrayTree, key: jax.Array, rows: Prefetched | None = None
    ) -> Pass:
        """Returns the means of `differentiate` over the micro-batches of a batch.

        Raises:
            ValueError: the objective has inputs, and there are several micro-batches.
        """
        micro_batches = self._config.train.grad_accumulation
        if micro_batches == 1:
            one = self.differentiate(state, state.buffers, batch, key, rows)
            reads, cotangents = jax.tree.map(lambda a: a[None], (one.reads, one.cotangents))
            return one._replace(reads=reads, cotangents=cotangents)
        if jax.tree.leaves(self._objective.inputs(batch)):
            raise ValueError(
                f"Objective.inputs: must be empty with train.grad_accumulation = {micro_batches}; gradients "
                "by inputs are not accumulated over micro-batches"
            )

        def body(
            carry: tuple[dict[str, ArrayTree], ArrayTree], batch_and_key: tuple[ArrayTree, jax.Array]
        ) -> tuple[
            tuple[dict[str, ArrayTree], ArrayTree], tuple[ArraysOfMemories, ArraysOfMemories, Metrics]
        ]:
            total, buffers = carry
            one = self.differentiate(state, buffers, *batch_and_key)
            total = jax.tree.map(jnp.add, total, one.gradients)
            return (total, one.buffers), (one.reads, one.cotangents, one.metrics)

        def split(array: jax.Array) -> jax.Array:
            # Strides over the batch, so that no sequence changes device between micro-batches.
            parts = array.reshape(-1, micro_batches, *array.shape[1:]).swapaxes(0, 1)
            return constrain_tokens(parts, axis=1)

        keys = jax.random.split(key, micro_batches)
        zeros = jax.tree.map(jnp.zeros_like, self._learning(state))
        (total, buffers), (reads, cotangents, metrics) = jax.lax.scan(
            body, (zeros, state.buffers), (jax.tree.map(split, batch), keys)
        )
        gradients = jax.tree.map(lambda g: g / micro_batches, total)
        cotangents = jax.tree.map(lambda c: c / micro_batches, cotangents)
        metrics = jax.tree.map(lambda m: m.mean(0), metrics)
        return Pass(gradients, cotangents, reads, buffers, metrics)

    def update_params(
        self, gradients: ArrayTree, opt_state: ArrayTree, params: ArrayTree
    ) -> tuple[ArrayTree, ArrayTree]:
        """Returns the dense parameters that learn, and their optimizer state, after a step."""
        updates, opt_state = self._optimizers.params.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def _step(
        self,
        state: TrainState,
        batch: ArrayTree,
        halted: jax.Array | None,
        ahead: tuple[Prefetched, dict[str, jax.Array]] | None,
    ) -> StepOutcome:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        rows, next_slots = ahead if ahead is not None else (None, {})
        found = self.accumulate(state, batch, key, rows)
        gradients, metrics, model = found.gradients, found.metrics, self._config.model
        tables, table_state = state.tables, state.table_state
        metrics["gradient_norm"] = optax.tree.norm(gradients["params"])

        before: RowsOverwritten | None = None
        following: Prefetched | None = None
        if self._is_dense:
            usage, usage_metrics = record_usage(model, state.usage, found.reads)
            learning = self._learning(state)["memory"]
            change, table_state = self._optimizers.tables.update(gradients["memory"], table_state, learning)
            tables = overlaid(tables, optax.apply_updates(learning, change))
            for name in tables:
                usage_metrics[name]["row_norm"] = optax.tree.norm(tables[name])
        else:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
            if halted is not None:
                finite &= ~halted
            if "inputs" in gradients:
                finite &= jnp.isfinite(optax.tree.norm(gradients["inputs"]))
            if ahead is not None:
                following = gather_ahead(model, tables, next_slots)
                finite &= are_read(following)  # as `rows_if` demands of all that reads a table
            tables, table_state, usage, usage_metrics, before, written = update_tables(
                model,
                self._optimizers.rows,
                state,
                found.reads,
                found.cotangents,
                finite,
                self._record_before,
                selection_of(self._config.train),
            )
            if following is not None:
                following = with_rows_written(model, following, next_slots, written)
        learning = self._learning(state)["params"]
        params, opt_state = self.update_params(gradients["params"], state.opt_state, learning)
        metrics["parameter_norm"] = optax.tree.norm(params)
        state = state.replace(
            step=state.step + 1,
            params=overlaid(state.params, params),
            opt_state=opt_state,
            tables=tables,
            table_state=table_state,
            usage=usage,
            buffers=found.buffers,
        )
        metrics |= flat_metrics(usage_metrics)
        return StepOutcome(state, metrics, before, gradients.get("inputs", {}), following)


def flat_metrics(nested: ArrayTree) -> Metrics:
    """Returns nested scalars under one name each: {"memory_0/output_std": float32 scalar}."""
    flat = {}
    for path, value in jax.tree_util.tree_flatten_with_path(nested)[0]:
        names = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
        flat["/".join(names)] = jnp.asarray(value, jnp.float32)
    return flat
