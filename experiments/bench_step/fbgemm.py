"""Times a pooled lookup and the update of its rows: FBGEMM's embedding tables beside our operations.

FBGEMM (`fbgemm_gpu`, PyTorch) trains the embedding tables of recommenders. Its table-batched embedding sums
the rows that a token reads, weighed by scores. Its backward pass also updates these rows. `FbgemmLookup` runs
it on the CPU. `OwnLookup` computes the same numbers with `pooled_lookup`, `score_products` and
`update_by_reads`. Both update rows by row-wise Adagrad.

A step is one lookup of T·R rows, and the backward pass from a given cotangent, with the gradient of the
scores. Converting the arguments is not timed.

Two properties of FBGEMM's wheel for CPUs (`fbgemm-gpu-cpu` 1.8.0) matter for a comparison:

- It is built without OpenMP: its kernels use one CPU core. On one core (`taskset -c 0`), 512 tokens, 64 reads
  of 128 values and 65,536 slots, it takes 1.5 ms forward and 9.0 backward; we take 2.3 and 4.1. On two cores
  we take 1.2 and 2.3.
- Its kernel for the gradient of the scores takes three quarters of the backward pass. It runs even where the
  scores need no gradient.
"""

import importlib.util
import time
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.model_steps import traced
from ultramem_jax.ops.lookup import GradientsOfReads, pooled_lookup, rows_read, score_products
from ultramem_jax.reporting.environment import cpu_cores
from ultramem_jax.training.row_rules import SquareSums, adagrad_row
from ultramem_jax.training.row_sparse import row_sparse, update_by_reads

_RATE = 1e-3
_EPS = 1e-8
"""Least root to divide by. FBGEMM adds it to the root, we add its square within the root."""


def is_installed() -> bool:
    """Tells whether PyTorch and FBGEMM can be imported."""
    return all(importlib.util.find_spec(name) for name in ("torch", "fbgemm_gpu"))


def torch_on_all_cores() -> Any:
    """Returns the module `torch`, set to use every CPU core that this process may use.

    Raises:
        ImportError: PyTorch is not installed.
    """
    import torch

    torch.set_num_threads(cpu_cores())
    return torch


class FbgemmLookup:
    """Looks up and updates rows with FBGEMM's table-batched embedding, in float32 on the CPU."""

    def __init__(self, num_slots: int, width: int):
        """Makes the table.

        Args:
            num_slots: N.
            width: d, values of a row.

        Raises:
            ImportError: `is_installed()` is False.
        """
        self._torch = torch_on_all_cores()
        # FBGEMM warns when it is imported without CUDA, because optimizers for SSDs are missing.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fbgemm_gpu.split_embedding_configs import EmbOptimType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
                BoundsCheckMode,
                EmbeddingLocation,
                PoolingMode,
            )
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                ComputeDevice,
                SplitTableBatchedEmbeddingBagsCodegen,
            )
        self._embedding = SplitTableBatchedEmbeddingBagsCodegen(
            [(num_slots, width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=_RATE,
            eps=_EPS,
            weight_decay=0.0,
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,  # we do not check slots either
        )
        _fill(self.table)
        self.pooled = self.score_gradient = np.zeros(0, np.float32)

    @property
    def table(self) -> np.ndarray:
        """Returns the table, (N, d) float32; a view."""
        (table,) = self._embedding.split_embedding_weights()
        return table.numpy()

    def step(self, slots: np.ndarray, weights: np.ndarray, cotangent: np.ndarray) -> tuple[float, float]:
        """Looks up rows and updates them; keeps `pooled` (T, d) and `score_gradient` (T, R).

        Args:
            slots: (T, R) int32 in [0, N).
            weights: (T, R) float32, the scores of the reads.
            cotangent: (T, d) float32, of the pooled rows.

        Returns:
            Seconds of the lookup, and of the backward pass with the update.
        """
        torch = self._torch
        # FBGEMM's indices have 64 bits unless told otherwise. It would convert others within the timed call.
        indices = torch.tensor(slots.reshape(-1), dtype=torch.int64)
        bags = torch.arange(0, slots.size + 1, slots.shape[1], dtype=torch.int64)
        scores = torch.tensor(weights.reshape(-1)).requires_grad_()
        of_pooled = torch.tensor(cotangent)
        start = time.perf_counter()
        pooled = self._embedding(indices, bags, per_sample_weights=scores)
        middle = time.perf_counter()
        pooled.backward(of_pooled)
        end = time.perf_counter()
        self.pooled, self.score_gradient = pooled.detach().numpy(), scores.grad.numpy().reshape(slots.shape)
        return middle - start, end - middle


class OwnLookup:
    """Looks up and updates rows with the operations of this library, in float32 on JAX's default device."""

    def __init__(self, num_slots: int, width: int, *, kernels: bool = True):
        """Makes the table, the same as that of `FbgemmLookup`.

        Args:
            num_slots: N.
            width: d, values of a row.
            kernels: whether native kernels may compute. Without them XLA computes everything.
        """
        with_or_without = partial(traced, kernels=kernels)
        self._optimizer = row_sparse(adagrad_row(_EPS, weight_decay=0.0), optax.constant_schedule(_RATE))
        self._forward = jax.jit(with_or_without(_pool))
        # Two programs: in one program XLA would update a copy of the table, because nothing makes the update
        # wait for the products. In a training step it waits until the loss is known to be finite.
        self._gradient = jax.jit(with_or_without(_multiply))
        self._backward = jax.jit(with_or_without(self._update), donate_argnums=(0, 1))
        _fill(rows := np.empty((num_slots, width), np.float32))
        # A copy: the memory of a NumPy array cannot be donated.
        self._table = jnp.array(rows, copy=True)
        self._sums = self._optimizer.init(self._table)
        self.pooled = self.score_gradient = np.zeros(0, np.float32)

    @property
    def table(self) -> np.ndarray:
        """Returns the table, (N, d) float32; a copy, because a step overwrites the table."""
        return np.array(self._table)

    def step(self, slots: np.ndarray, weights: np.ndarray, cotangent: np.ndarray) -> tuple[float, float]:
        """Does what `FbgemmLookup.step` does. The first step also compiles."""
        reads = jax.block_until_ready((jnp.array(slots), jnp.array(weights[..., None])))
        of_pooled = jax.block_until_ready(jnp.array(cotangent[:, None]))
        start = time.perf_counter()
        pooled = jax.block_until_ready(self._forward(self._table, *reads))
        middle = time.perf_counter()
        of_scores = self._gradient(self._table, reads[0], of_pooled)
        self._table, self._sums = self._backward(self._table, self._sums, *reads, of_pooled)
        jax.block_until_ready((self._table, self._sums, of_scores))
        end = time.perf_counter()
        self.pooled, self.score_gradient = np.asarray(pooled)[:, 0], np.asarray(of_scores)[..., 0]
        return middle - start, end - middle

    def _update(
        self, table: jax.Array, sums: SquareSums, slots: jax.Array, scores: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, SquareSums]:
        """Returns the table and the sums after the update."""
        rows = rows_read(slots, len(table))
        reads = GradientsOfReads(rows, jnp.zeros_like(slots), scores, cotangent)
        # Neither the rate nor float32 rows depend on the step and the seed.
        step, seed = jnp.int32(0), jnp.uint32(0)
        after = update_by_reads(self._optimizer, reads, sums, table, step, seed)
        return after.table, after.moments


def _pool(table: jax.Array, slots: jax.Array, scores: jax.Array) -> jax.Array:
    """Returns the pooled rows, (T, 1, d): all reads of a token are in one block."""
    return pooled_lookup(table, slots, jnp.zeros_like(slots), scores, 1)


def _multiply(table: jax.Array, slots: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns the gradient of the scores, (T, R, 1)."""
    return score_products(table, slots, jnp.zeros_like(slots), cotangent, 1)


def _fill(rows: np.ndarray) -> None:
    """Fills a table with numbers in [-0.5, 0.5), always the same ones."""
    np.random.default_rng(0).random(out=rows, dtype=np.float32)
    rows -= 0.5
