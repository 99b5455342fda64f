"""Compares the default device with the CPU and with reference vectors, in float32 at highest precision."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.interop.reference_torch import load
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
"""Largest difference after `_STEPS` steps, over the largest number of the array. On a CPU, the algorithms of
a GPU differ by at most 9e-7 from the CPU's own (`ultramem-tiny`)."""
_ALLOWED_OF_REFERENCES = 2e-5
"""A CPU differs by at most 4e-7 from the vectors of the papers' layers."""
_BUFFERS = ("shuffle_index", "tucker_core_u", "tucker_core_v", "lookup_table")
"""Last parts of the names of buffers in the authors' state dicts."""
_DERIVED = ("grad.", "aux.", "f64.")


class Difference(NamedTuple):
    """Holds how far the default device is from what is expected, in one part of a model."""

    model: str
    part: str
    difference: float
    """Largest difference over the largest number; NaN where a number is not finite."""
    allowed: float
    holds: bool
    """Whether the difference is allowed."""


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
            yield _judged(name, part, here[part], there[part], allowed)


def compare_references(folder: pathlib.Path) -> Iterator[Difference]:
    """Yields the differences from reference vectors: layers of the papers' authors, and their gradients.

    Args:
        folder: has `NAME.npz` with the state dict, `x`, `output`, `cotangent` and `grad.x`, and `NAME.json`
            with the hyper-parameters, as `interop.reference_torch` takes them. Other files are left out.
    """
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            arrays = dict(file)
        if not {"x", "output", "cotangent", "grad.x"} <= arrays.keys():
            continue
        names = {name.removeprefix("grad.") for name in arrays if name.startswith("grad.")} - {"x"}
        state = {name: array for name, array in arrays.items() if name in names or name.endswith(_BUFFERS)}
        state = {
            name: array for name, array in state.items() if not name.startswith(("grad.", "aux.", "f64."))
        }
        module, variables = load(state, json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        inputs = [jnp.asarray(arrays[name]) for name in ("x", "token_ids") if name in arrays]
        loss = partial(_product_with, module, variables, arrays["cotangent"])
        with jax.default_matmul_precision("highest"), native.turned_off():
            by_x, y = jax.jit(jax.grad(loss, has_aux=True))(*inputs)
        for part, found, name in (("output", y, "output"), ("gradient by x", by_x, "grad.x")):
            yield _judged(path.stem, part, found, arrays[name], _ALLOWED_OF_REFERENCES)


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


def _product_with(
    module: Any, variables: Any, cotangent: np.ndarray, *inputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y = module.apply(variables, *inputs)
    return (y * cotangent).sum(), y


def _judged(model: str, part: str, one: ArrayTree, other: ArrayTree, allowed: float) -> Difference:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    found = [
        np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() / max(np.abs(b).max(), 1e-6)
        for a, b in pairs
    ]
    difference = float(np.max(found, initial=0.0))  # of Python's numbers, `max` would lose a NaN
    return Difference(model, part, difference, allowed, bool(difference <= allowed))
