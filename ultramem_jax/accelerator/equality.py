"""Compares training on the default device with the CPU: float32, products at highest precision."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.kernels import native
from ultramem_jax.platforms import Platform, targeting
from ultramem_jax.presets import preset
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.state import init_state
from ultramem_jax.training.step import make_train_step
from ultramem_jax.tree_types import ArrayTree

MODELS = ("ultramem-tiny", "engram-tiny", "moe-tiny", "ultramem-v2-tiny", "pkm-tiny")
"""Presets that are compared, in order of value."""
_STEPS = 3
_ALLOWED = {"loss": 2e-5, "params": 1e-4, "tables": 1e-4}
"""Largest difference after `_STEPS` steps, over the largest number of the array."""


class Difference(NamedTuple):
    """Holds how far the default device is from the CPU in one part of a model's state."""

    model: str
    part: str
    difference: float
    """Largest difference over the largest number."""
    allowed: float

    @property
    def holds(self) -> bool:
        """Tells whether the difference is allowed."""
        return self.difference <= self.allowed


def compare(models: tuple[str, ...] = MODELS, target: Platform | None = None) -> Iterator[Difference]:
    """Yields the differences of every model.

    Args:
        models: presets.
        target: platform whose algorithms the default device runs; None for its own.
    """
    for name in models:
        config = _config(preset(name))
        here, there = _train(config, jax.devices()[0], target), _train(config, jax.devices("cpu")[0], "cpu")
        for part, allowed in _ALLOWED.items():
            yield Difference(name, part, _difference(here[part], there[part]), allowed)


def _config(model: ModelConfig) -> RunConfig:
    return RunConfig(
        dataclasses.replace(model, dropout=0.0),
        DataConfig(seq_len=64),
        # A larger epsilon: where a gradient is the rounding of a sum, Adam's first step has a chance sign.
        TrainConfig(batch_size=4, steps=10, warmup_fraction=0.0, eps=1e-4),
    )


def _train(config: RunConfig, device: jax.Device, target: Platform | None) -> dict[str, ArrayTree]:
    optimizers = make_optimizers(config)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (_STEPS, 4, 65)).astype(np.int32)
    with jax.default_device(jax.devices("cpu")[0]), native.turned_off(), targeting("cpu"):
        state = jax.jit(lambda: init_state(config, optimizers))()
    state = jax.device_put(state, device)
    losses = []
    with jax.default_matmul_precision("highest"), native.turned_off(), targeting(target):
        step = jax.jit(make_train_step(config, optimizers), donate_argnums=0)
        for batch in tokens:
            state, metrics = step(state, jax.device_put(jnp.asarray(batch), device))
            losses.append(metrics["loss"])
    return jax.device_get({"loss": losses, "params": state.params, "tables": state.tables})


def _difference(one: ArrayTree, other: ArrayTree) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    found = [
        np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() / max(np.abs(b).max(), 1e-6)
        for a, b in pairs
    ]
    return float(max(found, default=0.0))
