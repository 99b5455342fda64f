"""Times training steps of whole models on the default device, and their share of its peak."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.accelerator.timing import median_seconds
from ultramem_jax.accounting import flops_per_token
from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.planning.hardware import hardware_of
from ultramem_jax.presets import preset
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.state import TrainState, init_state
from ultramem_jax.training.step import make_train_step

MODELS = ("dense-151m", "ultramem-151m-x12", "moe-151m-2in32")
"""Presets that are timed, in order of value."""
_PASSES = 3
"""Passes over the weights: forward, backward by input, and backward by weight."""
_WARM_UP, _STEPS = 2, 10


class Speed(NamedTuple):
    """Holds how fast a model trains."""

    model: str
    dtype: str
    batch: str
    milliseconds: float
    """Median of the steps that count. The host waits for each, which training does not."""
    tokens_per_second: float
    utilisation: float | None
    """Model FLOPs, 3 times those of a forward pass, over the peak of products; None if that is unknown."""
    temporaries: int
    """Bytes that the compiled step holds beside its arguments."""


def train_speeds(
    models: tuple[str, ...] = MODELS,
    batch_size: int = 8,
    seq_len: int = 1024,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> Iterator[Speed]:
    """Yields the speed of every model, on random tokens and with dropout off.

    Args:
        models: presets.
        batch_size: B.
        seq_len: S.
        dtype: dtype of the computation.
    """
    for name in models:
        model = dataclasses.replace(preset(name), dtype=dtype, dropout=0.0)
        yield _speed(name, model, batch_size, seq_len)


def _speed(name: str, model: ModelConfig, batch_size: int, seq_len: int) -> Speed:
    config = RunConfig(model, DataConfig(seq_len=seq_len), TrainConfig(batch_size=batch_size))
    optimizers = make_optimizers(config)
    state = jax.jit(lambda: init_state(config, optimizers))()
    batches = jax.random.randint(
        jax.random.key(0), (_WARM_UP + _STEPS, batch_size, seq_len + 1), 0, model.vocab_size, jnp.int32
    )
    step = jax.jit(make_train_step(config, optimizers), donate_argnums=0).lower(state, batches[0]).compile()
    memory = step.memory_analysis()
    coming = iter(jax.block_until_ready([*batches]))

    def next_step() -> TrainState:
        nonlocal state
        state, _ = step(state, next(coming))
        return state

    median, tokens = median_seconds(next_step, _STEPS, _WARM_UP), batch_size * seq_len
    hardware = hardware_of(jax.devices()[0].device_kind)
    flops = _PASSES * flops_per_token(model, seq_len).total * tokens
    return Speed(
        name,
        model.dtype,
        f"{batch_size} × {seq_len}",
        median * 1e3,
        tokens / median,
        flops / median / hardware.matmul_flops(model.dtype) if hardware else None,
        int(memory.temp_size_in_bytes) if memory else 0,
    )
