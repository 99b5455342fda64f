"""Defines one training step of a language model, and the loss of one batch of evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.config import RunConfig
from ultramem_jax.models import Transformer
from ultramem_jax.ops.on_mesh import MeshAxes, on_mesh
from ultramem_jax.parallel.rules import gathered, logical_axes
from ultramem_jax.training.dense_optimizer import Optimizers, table_learning_rates
from ultramem_jax.training.module_step import Metrics, ModuleStep, Objective, flat_metrics
from ultramem_jax.training.schedules import learning_rate
from ultramem_jax.training.state import TrainState
from ultramem_jax.tree_types import ArrayTree, Variables


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the cross-entropies (B, S) in nats of logits (B, S, V) float32 for targets (B, S)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def language_model_objective(config: RunConfig, axes: MeshAxes | None = None) -> Objective:
    """Returns the mean cross-entropy of the next token, with the auxiliary losses of the layers.

    Batches are tokens (B, S + 1) int32. Metrics are those of the layers, `loss` (nats per token, without
    auxiliary losses) and `auxiliary_loss`.

    Args:
        config: of the run.
        axes: of the mesh; None for one device.
    """
    model, logical = Transformer(config.model), logical_axes(config.model)

    def loss(
        variables: Variables, inputs: ArrayTree, tokens: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Variables, Metrics]]:
        whole = {**variables, "params": gathered(variables["params"], axes, logical)}
        logits, sown = model.apply(
            whole,
            tokens[:, :-1],
            train=True,
            rngs={"dropout": key},
            mutable=["reads", "losses", "metrics", "buffers"],
        )
        cross_entropy = token_losses(logits, tokens[:, 1:]).mean()
        auxiliary = sum(jax.tree.leaves(sown.get("losses", {})), jnp.zeros((), jnp.float32))
        metrics = {"loss": cross_entropy, "auxiliary_loss": auxiliary} | flat_metrics(sown.get("metrics", {}))
        return cross_entropy + auxiliary, (sown, metrics)

    return Objective(loss, num_tokens=lambda tokens: tokens.shape[0] * (tokens.shape[1] - 1))


def make_train_step(
    config: RunConfig,
    optimizers: Optimizers,
    record_before: bool = False,
    axes: MeshAxes | None = None,
) -> Callable[[TrainState, jax.Array], tuple[Any, ...]]:
    """Returns the step (state, tokens (B, S + 1) int32) -> (state, metrics), to compile with a donated state.

    Metrics are float32 scalars: `loss` (nats per token, without auxiliary losses), `auxiliary_loss`,
    `gradient_norm` (of the dense parameters, before clipping), `parameter_norm`, `learning_rate`, with
    memories `value_learning_rate`, per memory those of the layer, and per table those of `record_reads` and
    `row_norm`, the norm of the rows that the step wrote (of the whole table in the dense way).

    Args:
        config: of the run.
        optimizers: of `make_optimizers`.
        record_before: whether the step returns (state, metrics, before): per table and array of it
            `RowsBefore`, the rows that the step wrote as they were before it. Only on one device, and not in
            the dense way.
        axes: of the mesh, for a state that lies there as `abstract_state` says, and tokens split over
            `axes.tokens`; None for one device.
    """
    step = ModuleStep(config, optimizers, language_model_objective(config, axes), record_before, axes)
    rate, value_rates = learning_rate(config.train), table_learning_rates(config)

    def train_step(state: TrainState, tokens: jax.Array) -> tuple[Any, ...]:
        rates = {"learning_rate": rate(state.step)}
        for group, value_rate in value_rates.items():
            name = "value_learning_rate" if len(value_rates) == 1 else f"{group}/value_learning_rate"
            rates[name] = value_rate(state.step)
        after = step(state, tokens)
        metrics = after.metrics | rates
        return (after.state, metrics, after.before) if record_before else (after.state, metrics)

    return train_step


def make_eval_step(
    config: RunConfig, axes: MeshAxes | None = None
) -> Callable[[dict[str, Any], jax.Array, jax.Array], jax.Array]:
    """Returns the function (variables, tokens (B, S + 1), mask (B, S)) -> [sum of losses, number of targets].

    Both are in one array (2,) float32, the losses in nats; targets whose mask is 0 do not count.

    Args:
        config: of the run.
        axes: as for a training step.
    """
    model, logical = Transformer(config.model), logical_axes(config.model)

    def eval_step(variables: dict[str, Any], tokens: jax.Array, mask: jax.Array) -> jax.Array:
        with on_mesh(axes):
            whole = variables | {"params": gathered(variables["params"], axes, logical)}
            logits: Any = model.apply(whole, tokens[:, :-1])
        of_sequences = (token_losses(logits, tokens[:, 1:]) * mask).sum(1)
        # Times 1, or 0 where nothing counts: of two sums that follow each other directly the compiler makes
        # one, and a sum over all targets is longer, and rounds more, than sums of sequences.
        return jnp.stack([(of_sequences * mask.max(1)).sum(), mask.sum()])

    return eval_step
