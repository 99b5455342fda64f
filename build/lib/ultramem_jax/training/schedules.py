"""Defines learning rates as functions of the step, which counts from 0."""

import math

import jax.numpy as jnp
import optax

from ultramem_jax.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Returns a linear warm-up to the peak, then a cosine to `final_lr_fraction` of the peak.

    The cosine ends at the last step. Step s takes the rate of s + 1, so that the first step already learns.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(warmup_steps(config), config.steps - 1),
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_lr_fraction,
    )
    return lambda step: schedule(step + 1)


def warmup_steps(config: TrainConfig) -> int:
    """Returns the number of warm-up steps, rounded up."""
    # Rounding comes first, because 7 % of 100 in floats is a little more than 7.
    return math.ceil(round(config.warmup_fraction * config.steps, 6))


def value_learning_rate(config: TrainConfig, multiple: float, final: float = 1.0) -> optax.Schedule:
    """Returns the tables' rate: the dense rate times a factor that goes linearly from `multiple` to `final`.

    The source is the UltraMem paper, section 4 ("value lr decay"). The factor is `final` at the last step.
    """
    base = learning_rate(config)
    span = max(config.steps - 1, 1)

    def schedule(step: jnp.ndarray) -> jnp.ndarray:
        done = jnp.clip(jnp.asarray(step, jnp.float32) / span, 0.0, 1.0)
        return base(step) * (multiple + (final - multiple) * done)

    return schedule
