"""Makes the training step, and the step that computes the loss of one evaluation batch.

The loss is differentiated with respect to the dense parameters and to the pooled reads of every memory, but
not with respect to the tables. The sown reads and the cotangents of the pooled sums give the gradients of the
rows that were read (`table_gradients`). The tables' optimizer touches only these rows. So the compiled step
holds no array of a table's size besides the donated tables and moments themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.config import RunConfig
from ultramem_jax.models import Transformer
from ultramem_jax.ops.on_mesh import MeshAxes, constrain_tokens, on_mesh
from ultramem_jax.parallel.rules import gathered, logical_axes
from ultramem_jax.training.dense_optimizer import Optimizers, table_learning_rates
from ultramem_jax.training.schedules import learning_rate
from ultramem_jax.training.state import TrainState, model_variables
from ultramem_jax.training.table_gradients import ArraysOfMemories, perturbations
from ultramem_jax.training.table_updates import record_usage, update_tables
from ultramem_jax.training.undo_log import RowsOverwritten
from ultramem_jax.tree_types import ArrayTree, Variables

Metrics: TypeAlias = dict[str, jax.Array]
"""Float32 scalars () by name."""


class _Gradients(NamedTuple):
    """Holds the gradients of a step or of a micro-batch, and what its forward pass left."""

    grads: dict[str, ArrayTree]
    """Gradients by collection: of `params` and, in the dense way, of `memory`."""
    buffers: ArrayTree
    """The `buffers` collection after the forward pass."""
    reads: ArraysOfMemories
    """Reads, as the memories sowed them into `reads`."""
    cotangents: ArraysOfMemories
    """Gradients with respect to `perturbations`; empty in the dense way."""
    metrics: Metrics


StepResult: TypeAlias = tuple[TrainState, Metrics] | tuple[TrainState, Metrics, RowsOverwritten]
"""Result of a training step: the state after it, its metrics and, if asked for, the rows overwritten."""


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns (B, S) cross-entropies in nats of logits (B, S, V) float32 for targets (B, S)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def make_train_step(
    config: RunConfig,
    optimizers: Optimizers,
    record_before: bool = False,
    axes: MeshAxes | None = None,
) -> Callable[[TrainState, jax.Array], StepResult]:
    """Returns the step (state, tokens (B, S + 1) int32) -> (state, metrics).

    Compile it with the state donated.

    Metrics are float32 scalars:

    - `loss`: nats per token, without auxiliary losses;
    - `auxiliary_loss`;
    - `gradient_norm`: of the dense parameters, before clipping;
    - `parameter_norm` and `learning_rate`;
    - with memories `value_learning_rate`, and per memory the metrics of the layer;
    - per table the metrics of `record_reads`, and `row_norm`: the norm of the rows that the step wrote, or of
      the whole table in the dense way.

    Args:
        config: of the run.
        optimizers: from `make_optimizers`.
        record_before: whether the step returns (state, metrics, before). `before` holds, per table and array
            of it, `RowsBefore`: the rows that the step wrote, as they were before it. The dense way does not
            have this, and it works only on one device.
        axes: of the mesh, for a step on a mesh. Its state is placed as `abstract_state` says, and its tokens
            are split over `axes.tokens`. None is one device.
    """
    model, dense = Transformer(config.model), config.train.table_gradient == "dense"
    micro_batches, logical = config.train.grad_accumulation, logical_axes(config.model)
    rate, value_rates = learning_rate(config.train), table_learning_rates(config)

    def loss(
        differentiated: dict[str, ArrayTree],
        state: TrainState,
        buffers: ArrayTree,
        tokens: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[ArrayTree, ArraysOfMemories, Metrics]]:
        variables = model_variables(state) | {"buffers": buffers} | differentiated
        variables["params"] = gathered(variables["params"], axes, logical)
        logits, sown = model.apply(
            variables,
            tokens[:, :-1],
            train=True,
            rngs={"dropout": key},
            mutable=["reads", "losses", "metrics", "buffers"],
        )
        cross_entropy = token_losses(logits, tokens[:, 1:]).mean()
        auxiliary = sum(jax.tree.leaves(sown.get("losses", {})), jnp.zeros((), jnp.float32))
        metrics = {"loss": cross_entropy, "auxiliary_loss": auxiliary} | _flatten(sown.get("metrics", {}))
        return cross_entropy + auxiliary, (sown.get("buffers", {}), sown.get("reads", {}), metrics)

    def gradients(state: TrainState, buffers: ArrayTree, tokens: jax.Array, key: jax.Array) -> _Gradients:
        """Returns the gradients of one micro-batch, and what its forward pass left."""
        if dense:
            differentiated = {"params": state.params, "memory": state.tables}
        else:
            zeros = perturbations(config.model, tokens.shape[0] * (tokens.shape[1] - 1))
            differentiated = {"params": state.params, "perturbations": zeros}
        grads, left = jax.grad(loss, has_aux=True)(differentiated, state, buffers, tokens, key)
        buffers, reads, metrics = left
        cotangents = grads.pop("perturbations", {})
        return _Gradients(grads, buffers, reads, cotangents, metrics)

    def accumulated(state: TrainState, tokens: jax.Array, key: jax.Array) -> _Gradients:
        """Returns means over the micro-batches.

        Reads and their cotangents get a leading axis of micro-batches.
        """
        if micro_batches == 1:
            of_batch = gradients(state, state.buffers, tokens, key)
            reads, cotangents = jax.tree.map(lambda a: a[None], (of_batch.reads, of_batch.cotangents))
            return of_batch._replace(reads=reads, cotangents=cotangents)

        def body(
            carry: tuple[dict[str, ArrayTree], ArrayTree], batch: tuple[jax.Array, jax.Array]
        ) -> tuple[
            tuple[dict[str, ArrayTree], ArrayTree], tuple[ArraysOfMemories, ArraysOfMemories, Metrics]
        ]:
            total, buffers = carry
            grads, buffers, reads, cotangents, metrics = gradients(state, buffers, *batch)
            return (jax.tree.map(jnp.add, total, grads), buffers), (reads, cotangents, metrics)

        # Strides over the batch, so that no sequence changes device between micro-batches.
        split = tokens.reshape(-1, micro_batches, tokens.shape[1]).swapaxes(0, 1)
        split = constrain_tokens(split, axis=1)
        keys = jax.random.split(key, micro_batches)
        start = {"params": state.params} | ({"memory": state.tables} if dense else {})
        zeros = jax.tree.map(jnp.zeros_like, start)
        (total, buffers), (reads, cotangents, metrics) = jax.lax.scan(
            body, (zeros, state.buffers), (split, keys)
        )
        grads = jax.tree.map(lambda g: g / micro_batches, total)
        cotangents = jax.tree.map(lambda c: c / micro_batches, cotangents)
        metrics = jax.tree.map(lambda m: m.mean(0), metrics)
        return _Gradients(grads, buffers, reads, cotangents, metrics)

    def train_step(state: TrainState, tokens: jax.Array) -> StepResult:
        with on_mesh(axes):
            return one_step(state, tokens)

    def one_step(state: TrainState, tokens: jax.Array) -> StepResult:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        grads, buffers, reads, cotangents, metrics = accumulated(state, tokens, key)
        tables, table_state = state.tables, state.table_state
        updates, opt_state = optimizers.params.update(grads["params"], state.opt_state, state.params)
        metrics["gradient_norm"] = optax.tree.norm(grads["params"])
        metrics["learning_rate"] = rate(state.step)
        for group, value_rate in value_rates.items():
            name = "value_learning_rate" if len(value_rates) == 1 else f"{group}/value_learning_rate"
            metrics[name] = value_rate(state.step)

        before: RowsOverwritten | None = None
        if dense:
            usage, usage_metrics = record_usage(config.model, state.usage, reads)
            change, table_state = optimizers.tables.update(grads["memory"], table_state, tables)
            tables = optax.apply_updates(tables, change)
            for name in tables:
                usage_metrics[name]["row_norm"] = optax.tree.norm(tables[name])
        else:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
            tables, table_state, usage, usage_metrics, before = update_tables(
                config.model, optimizers.rows, state, reads, cotangents, finite, record_before
            )
        params = optax.apply_updates(state.params, updates)
        metrics["parameter_norm"] = optax.tree.norm(params)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            tables=tables,
            table_state=table_state,
            usage=usage,
            buffers=buffers,
        )
        metrics |= _flatten(usage_metrics)
        if not record_before:
            return state, metrics
        assert before is not None
        return state, metrics, before

    return train_step


def make_eval_step(
    config: RunConfig, axes: MeshAxes | None = None
) -> Callable[[Variables, jax.Array, jax.Array], jax.Array]:
    """Returns a function that sums the losses of a batch in nats, and counts its targets.

    The function is (variables, tokens (B, S + 1), mask (B, S)) -> (2,) float32: the sum of losses and the
    number of targets. Targets whose mask is 0 do not count.

    Args:
        config: of the run.
        axes: of the mesh, as for `make_train_step`.
    """
    model, logical = Transformer(config.model), logical_axes(config.model)

    def eval_step(variables: Variables, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        with on_mesh(axes):
            whole = dict(variables) | {"params": gathered(variables["params"], axes, logical)}
            logits: Any = model.apply(whole, tokens[:, :-1])
        of_sequences = (token_losses(logits, tokens[:, 1:]) * mask).sum(1)
        # The factor is 1, or 0 for a sequence without counted targets. It keeps the two sums apart: the
        # compiler would merge them into one sum over all targets, which is longer and rounds more.
        return jnp.stack([(of_sequences * mask.max(1)).sum(), mask.sum()])

    return eval_step


def _flatten(sown: ArrayTree) -> Metrics:
    """Returns nested scalars as one flat dict: {"memory_0/output_std": value}."""
    flat = {}
    for path, value in jax.tree_util.tree_flatten_with_path(sown)[0]:
        names = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
        flat["/".join(names)] = jnp.asarray(value, jnp.float32)
    return flat
