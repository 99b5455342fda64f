"""Trains the UltraMem layer of the paper's authors, in PyTorch on the CPU, to be timed by `bench_step`.

The layer is `UltraMemLayerV1` of a checkout of
https://github.com/ZihaoHuang-notabot/Ultra-Sparse-Memory-Network (commit 041104b was tried). It is imported
from there, and computes everything except for the following. Stand-ins replace what needs CUDA or packages
that have nothing to do with the layer:

- `fuse_ops.fused_index.FusedLookup`, a CUDA kernel: the lookup of this module.
- `olmo.model.LayerNormBase`: `torch.nn.RMSNorm`, as their configs of UltraMem have it.
- `olmo.config.DistributedStrategy` and `wandb`: nothing is distributed or logged.

Shapes are those of `bench_memory`, and the table has as many parameters. These differences remain:

- Every rank has keys of full width, and all ranks share the query. With `kdim` = d_k/r, keys and key scores
  have the same size as ours, and the query has half the size.
- They have no convolution before the query, no core loss (it is commented out in their code), and no clipping
  here. Ours has all three.
- The shuffle is a stored permutation of E·n² int64, which every lookup reads at random. Ours is computed.
- Their gradient is dense, so that AdamW updates, and decays, every row of the table.
"""

import functools
import importlib
import importlib.util
import pathlib
import sys
import types
from typing import Any

import numpy as np

from experiments.bench_step.fbgemm import torch_on_all_cores
from experiments.bench_step.memory_step import EMBED_DIM, Way, bench_config, bench_memory
from ultramem_jax.errors import UserError, require
from ultramem_jax.layers.memory.product_keys import ProductKeys

REPOSITORY = "https://github.com/ZihaoHuang-notabot/Ultra-Sparse-Memory-Network"
_LAYER = "olmo.ultramem_layer"


class AuthorsLayer:
    """Trains the authors' layer by itself: forward, backward and AdamW of everything, in float32."""

    def __init__(self, checkout: str, num_keys: int, tokens: int):
        """Makes the layer and its optimizer.

        Args:
            checkout: folder of the authors' repository.
            num_keys: n; the table has n² slots.
            tokens: T of a step.

        Raises:
            UserError: PyTorch is not installed, or the folder is no such checkout.
        """
        self._tokens = tokens
        layer_class = _layer_class(checkout)
        self._torch = torch = torch_on_all_cores()
        run = bench_config(num_keys, Way(), tokens)
        (memory,) = run.model.memories.values()
        address, train = memory.address, run.train
        assert isinstance(address, ProductKeys)
        torch.manual_seed(0)
        self.layer = layer_class(
            hidden_size=EMBED_DIM,
            knum=num_keys,
            kdim=address.rank_key_dim,
            vdim=memory.table.value_dim,
            knn=address.top_m,
            head=address.num_heads,
            tucker_rank=address.tucker_rank,
            tucker_multihead=address.num_cores,
            value_expand_time=address.expansion,
            config=types.SimpleNamespace(
                layer_norm_eps=run.model.norm_eps, attention_layer_norm_with_affine=True, mem_log_interval=1
            ),
        )
        self.layer.reset_parameters(distributed_strategy=None)
        table = self.layer.values_for_look_up
        # As in their training, the lookup adds to a gradient that is kept. Making zeros of the table's size
        # in every step takes longer than clearing them.
        table.grad = table.main_grad = torch.zeros_like(table)
        others = [p for name, p in self.layer.named_parameters() if name != "values_for_look_up"]
        rate = train.learning_rate
        groups = [
            {"params": [table], "lr": rate * memory.value_lr_multiple, "weight_decay": train.weight_decay},
            {"params": [p for p in others if p.ndim > 1], "weight_decay": train.weight_decay},
            {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
        ]
        common = {"lr": rate, "betas": (train.b1, train.b2), "eps": train.eps}
        try:
            self._optimizer = torch.optim.AdamW(groups, **common, fused=True)
        except RuntimeError:  # PyTorch before 2.4 has no fused AdamW for the CPU
            self._optimizer = torch.optim.AdamW(groups, **common, foreach=True)

    def step(self, x: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Does one training step.

        Args:
            x: input of the layer, (B, S, D) float32, of T tokens.
            target: output that the mean square error compares with, same shape.

        Returns:
            The gradient by x, same shape.
        """
        torch = self._torch
        inputs = torch.tensor(x).reshape(self._tokens, -1).requires_grad_()
        # Their training loop also does this before every step.
        self.layer._online_update_tucker_approx()
        error = torch.nn.functional.mse_loss(self.layer(inputs), torch.tensor(target).reshape(inputs.shape))
        error.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        return inputs.grad.numpy().reshape(x.shape)


def state_bytes(num_keys: int) -> int:
    """Returns the bytes of what grows with the table: rows, gradient, two moments, and the permutation.

    Args:
        num_keys: n; the table has n² slots.
    """
    memory = bench_memory(num_keys, Way())
    return num_keys**2 * (4 * 4 * memory.table.value_dim + 8 * memory.num_blocks)


@functools.cache
def lookup_on_cpu() -> Any:
    """Returns a class that replaces the authors' `FusedLookup` on the CPU; its `apply` has their arguments.

    It sums rows by `embedding_bag`, with one bag per token, block and core, and adds gradients of rows by
    `index_add_` to `main_grad` of the table. This is the fastest of what was tried. Medians in milliseconds,
    on two CPU cores, 512 tokens, 64 reads, 65,536 slots:

    - sums: `embedding`, a product and `scatter_add_` 8.5, with `index_add_` 3.9, `embedding` and `bmm` 3.5,
      bags 1.2, of which the sum takes 0.3 and sorting the reads most of the rest;
    - gradient of the scores: bags 3.3, `embedding` and `bmm` 3.2;
    - gradients of rows: `index_add_` 2.4; with the zeros of the table's size that autograd makes,
      `embedding_dense_backward` 10.3; `index_put_` 11.3; a sparse tensor that is coalesced 8.9.

    A step of the layer takes 51, and with `embedding`, a product, `scatter_add` and plain autograd 63.
    """
    import torch

    class AddRowGradients(torch.autograd.Function):
        """Passes pooled rows on; its backward pass adds the gradients of the rows that were read."""

        @staticmethod
        def forward(ctx: Any, pooled: Any, table: Any, slots: Any, bags: Any, scores: Any) -> Any:
            ctx.save_for_backward(table, slots, bags, scores)
            return pooled.view_as(pooled)

        @staticmethod
        def backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
            table, slots, bags, scores = ctx.saved_tensors
            of_reads = cotangent.reshape(-1, table.shape[1]).index_select(0, bags)
            of_reads.view(*scores.shape, -1).mul_(scores[..., None])
            table.main_grad.index_add_(0, slots, of_reads)
            return cotangent, None, None, None, None

    class FusedLookup:
        """Sums rows, weighed by scores, within the blocks of every token."""

        @staticmethod
        def apply(virtual: Any, table: Any, scores: Any, *others: Any) -> Any:
            """Returns the pooled rows (T, E·d_v).

            Args:
                virtual: (T, R) int32, block · N + slot.
                table: (N, d_v) float32, with an array `main_grad` like it.
                scores: (h, T, R) float32.
                *others: a padding index, N (twice), a shift of 0, E, and False: no index is padding.
            """
            _, num_slots, _, _, expansion, _ = others
            cores, tokens, reads = scores.shape
            width = table.shape[1] // cores
            # A bag is a range of reads, so the reads of a token are sorted, and with them their blocks.
            virtual, order = virtual.long().sort(1)
            scores = scores.gather(2, order.expand(cores, -1, -1))
            block = virtual // num_slots
            slots = virtual - block * num_slots
            starts = torch.arange(0, expansion * num_slots, num_slots).expand(tokens, -1).contiguous()
            first = torch.searchsorted(virtual, starts) + torch.arange(0, tokens * reads, reads)[:, None]
            core = torch.arange(cores)[:, None]
            pooled = torch.nn.functional.embedding_bag(
                (slots.view(1, -1) * cores + core).view(-1),
                table.detach().view(-1, width),
                (first.view(1, -1) + core * (tokens * reads)).view(-1),
                mode="sum",
                per_sample_weights=scores.reshape(-1),
            )
            pooled = pooled.view(cores, tokens, expansion, width).permute(1, 2, 0, 3)
            bags = (block + torch.arange(0, tokens * expansion, expansion)[:, None]).view(-1)
            of_reads = scores.detach().view(cores, -1).t()
            pooled = AddRowGradients.apply(pooled.reshape(tokens, -1), table, slots.view(-1), bags, of_reads)
            return pooled

    return FusedLookup


@functools.cache
def _layer_class(checkout: str) -> Any:
    """Returns the authors' class of a layer.

    Raises:
        UserError: PyTorch is not installed, or the folder is no checkout of their repository.
    """
    folder = pathlib.Path(checkout) / "olmo"
    is_there = (folder / "ultramem_layer.py").is_file()
    require(is_there, "authors", checkout, f"must be a checkout of {REPOSITORY}")
    installed = importlib.util.find_spec("torch") is not None
    require(installed, "authors", checkout, "must not be given without PyTorch (pip install torch)")
    # They stay in place: the layer imports some of them when it is called.
    sys.modules.update(_stand_ins(folder))
    sys.modules.pop(_LAYER, None)
    try:
        return importlib.import_module(_LAYER).UltraMemLayerV1
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"authors = {checkout!r}: must be a checkout of {REPOSITORY} ({str(error).splitlines()[0]})"
        ) from error


def _stand_ins(folder: pathlib.Path) -> dict[str, types.ModuleType]:
    """Returns modules that replace what the layer imports, by name."""
    import torch

    class LayerNormBase:
        """Makes the norm of queries and keys."""

        @staticmethod
        def build(config: Any, size: int, **_: Any) -> Any:
            """Returns an RMS norm with a gain."""
            return torch.nn.RMSNorm(size, eps=config.layer_norm_eps)

    members: dict[str, dict[str, Any]] = {
        "olmo": {"__path__": [str(folder)]},  # a package whose `__init__` is not run
        "olmo.model": {"LayerNormBase": LayerNormBase},
        "olmo.config": {"DistributedStrategy": types.SimpleNamespace(fsdp="fsdp")},
        "fuse_ops": {"__path__": []},
        "fuse_ops.fused_index": {"FusedLookup": lookup_on_cpu()},
        "wandb": {"run": None},
    }
    modules = {}
    for name, content in members.items():
        modules[name] = types.ModuleType(name)
        modules[name].__dict__.update(content)
    return modules
