"""Makes the training step of a language model, and the step that sums the losses of an evaluation batch."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from ultramem_jax.config import RunConfig
from ultramem_jax.models import Transformer
from ultramem_jax.ops.on_mesh import MeshAxes, on_mesh
from ultramem_jax.parallel.rules import gathered, logical_axes
from ultramem_jax.training.dense_optimizer import Optimizers, table_learning_rates
from ultramem_jax.training.lora import adapted
from ultramem_jax.training.module_step import Metrics, ModuleStep, Objective, flat_metrics
from ultramem_jax.training.prefetch import Prefetched, slots_of_tokens
from ultramem_jax.training.schedules import learning_rate
from ultramem_jax.training.state import TrainState
from ultramem_jax.tree_types import ArrayTree, Variables

StepResult: TypeAlias = tuple[Any, ...]
"""Result of a training step: the state after it, its metrics and, if asked for, the rows that it overwrote
(`RowsOverwritten`) and those of the next batch (`Prefetched`)."""


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the cross-entropies (B, S) in nats of logits (B, S, V) float32 for targets (B, S)."""
    # The logit of a target is found by comparing, so that its derivative has no scatter.
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    chosen = ids == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(chosen, logits, 0).sum(-1)


def language_model_objective(config: RunConfig, axes: MeshAxes | None = None) -> Objective:
    """Returns the mean cross-entropy of the next token, with the auxiliary losses of the layers.

    Batches are tokens (B, S + 1) int32. Metrics are those of the layers, `loss` (nats per token, without
    auxiliary losses) and `auxiliary_loss`.

    Args:
        config: the run's config.
        axes: the axes of the mesh; None for one device.
    """
    model, logical = Transformer(config.model, config.train.remat), logical_axes(config.model)

    def loss(
        variables: Variables, inputs: ArrayTree, tokens: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Variables, Metrics]]:
        whole = {**variables, "params": adapted(gathered(variables["params"], axes, logical), config.train)}
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
) -> Callable[..., StepResult]:
    """Returns the step (state, tokens (B, S + 1) int32, halted=None, ahead=None) -> (state, metrics).

    Compile it with the state donated. Where `halted` () bool is True, the step writes no row of a table with
    row-sparse gradients. With `ahead`, rows of this batch that were gathered before (`prefetch.Prefetched`)
    and the tokens of the next one, the last of the results is the rows of the next batch.

    Metrics are float32 scalars:

    - `loss`: nats per token, without auxiliary losses;
    - `auxiliary_loss`;
    - `gradient_norm`: of the dense parameters that learn, before clipping;
    - `parameter_norm`: of the dense parameters that learn; `learning_rate`;
    - with memories `value_learning_rate`, and per memory the metrics of the layer;
    - per table the metrics of `record_reads`, with a selection of rows `selected_reads_share`, and
      `row_norm`: the norm of the rows that the step wrote, or of the whole table in the dense way.

    Args:
        config: the run's config.
        optimizers: the result of `make_optimizers`.
        record_before: whether the step returns (state, metrics, before). `before` holds, per table and array
            of it, `RowsBefore`: the rows that the step wrote, as they were before it. The dense way does not
            have this, and it works only on one device.
        axes: the axes of the mesh, for a step on a mesh. The state of that step is placed as `abstract_state`
            says, and its tokens are split over `axes.tokens`. None is one device.
    """
    step = ModuleStep(config, optimizers, language_model_objective(config, axes), record_before, axes)
    rate, value_rates = learning_rate(config.train), table_learning_rates(config)

    def train_step(
        state: TrainState,
        tokens: jax.Array,
        halted: jax.Array | None = None,
        ahead: tuple[Prefetched, jax.Array] | None = None,
    ) -> StepResult:
        rates = {"learning_rate": rate(state.step)}
        for group, value_rate in value_rates.items():
            name = "value_learning_rate" if len(value_rates) == 1 else f"{group}/value_learning_rate"
            rates[name] = value_rate(state.step)
        rows = None
        if ahead is not None:
            rows = ahead[0], slots_of_tokens(config.model, state.buffers, ahead[1])
        after = step(state, tokens, halted, rows)
        metrics = after.metrics | rates
        beside = (after.before, after.ahead)
        return after.state, metrics, *(one for one in beside if one is not None)

    return train_step


def is_finite(metrics: Metrics) -> jax.Array:
    """Returns whether the loss of a step, its gradient and all that it wrote are finite, as () bool."""
    return jnp.stack([jnp.isfinite(metrics[name]) for name in checked_metrics(metrics)]).all()


def checked_metrics(metrics: Iterable[str]) -> list[str]:
    """Returns the names of the metrics that must be finite."""
    return ["loss", "gradient_norm", "parameter_norm", *(n for n in metrics if n.endswith("/row_norm"))]


def make_eval_step(
    config: RunConfig, axes: MeshAxes | None = None
) -> Callable[[Variables, jax.Array, jax.Array], jax.Array]:
    """Returns a function that sums the losses of a batch in nats, and counts its targets.

    The function is (variables, tokens (B, S + 1), mask (B, S)) -> (2,) float32: the sum of losses and the
    number of targets. Targets whose mask is 0 do not count.

    Args:
        config: the run's config.
        axes: the axes of the mesh, as for `make_train_step`.
    """
    model, logical = Transformer(config.model), logical_axes(config.model)

    def eval_step(variables: Variables, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        with on_mesh(axes):
            params = adapted(gathered(variables["params"], axes, logical), config.train)
            whole = dict(variables) | {"params": params}
            logits: Any = model.apply(whole, tokens[:, :-1])
        of_sequences = (token_losses(logits, tokens[:, 1:]) * mask).sum(1)
        # The factor is 1, or 0 for a sequence without counted targets. It keeps the two sums apart: the
        # compiler would merge them into one sum over all targets, which is longer and rounds more.
        return jnp.stack([(of_sequences * mask.max(1)).sum(), mask.sum()])

    return eval_step
