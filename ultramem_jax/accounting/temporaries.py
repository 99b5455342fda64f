"""Derives the temporaries of a step from shapes alone: what a device holds beside state, batch and results.

A training step is largest at one of two moments. When the backward pass begins, everything that it needs has
been kept, and the logits are there. When rows are updated, the gradients of all dense parameters and of the
rows of a table are there. A compiler may hold a fifth more or less: it computes some things again, and keeps
others twice. Padding of layouts is not counted.

The letters are those of the axis legend in `ultramem_jax`; t is the tokens of one device, b the bytes of a
number in the model's dtype.

Training is derived for meshes whose axes `tensor` and `fsdp` have one device; with more, the numbers are too
large. In decoding the parts are not all there at the same time, so that their sum is more than a program
holds.
"""

from collections.abc import Mapping

from ultramem_jax.accounting.communication import Groups
from ultramem_jax.accounting.model import (
    DTYPE_BYTES,
    FLOAT32_BYTES,
    MLP_MATRICES,
    Parameters,
    count_parameters,
)
from ultramem_jax.config import ModelConfig, RunConfig
from ultramem_jax.config.exchange_shapes import CAUSAL_CHUNKS, group_rows
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import table_readers

_INT32_BYTES = 4
_ROW_ARRAYS = 3
"""Arrays over all reads of a table that sums by row hold at a time: gradients of reads, of groups, of
rows."""


def training_temporaries(
    config: RunConfig,
    sizes: Mapping[str, int],
    chunk_values: int,
    groups_experts: bool,
    row_multiple: int = 1,
) -> dict[str, int]:
    """Returns the bytes of a training step's temporaries on one device, by part, at the larger moment.

    Args:
        config: the run.
        sizes: devices along each mesh axis.
        chunk_values: most float32 values that one chunk of tokens holds (`ops.algorithms`).
        groups_experts: whether the weights of experts are gathered by groups of rows (`layers.experts`).
        row_multiple: number whose multiple the width of a row is padded to; 128 on a TPU.
    """
    model, train = config.model, config.train
    groups = Groups.of(config, sizes)
    shards = groups.size(groups.tokens)
    sequences = -(-train.batch_size // (shards * train.grad_accumulation))
    tokens = sequences * config.data.seq_len
    parameters = count_parameters(model)
    experts = parameters.experts // groups.size(groups.experts)
    gradients = FLOAT32_BYTES * (parameters.dense + experts)
    kept = _kept_of_memories(model, tokens)
    # With remat, the layer that the backward pass is at has all of its activations, and the others only few.
    whole, few = (model.num_layers, 0) if train.remat == "none" else (1, model.num_layers)
    of_token = whole * _layer_bytes(model) + few * _kept_bytes(model, train.remat)
    if train.remat == "none":
        of_token += _scanned_layers(model) * _loop_bytes(model)
    backward = {
        "activations of layers": tokens * of_token,
        "attention weights": whole * _attention_bytes(model, sequences, config.data.seq_len),
        "reads and pooled values": kept,
        "logits": FLOAT32_BYTES * tokens * model.vocab_size,
        "gradients": gradients,
        "choice of rows": FLOAT32_BYTES * min(chunk_values, tokens * _choosing_width(model)),
        "weights of groups": _group_bytes(model, tokens) if groups_experts else 0,
        "stacked weights": _stacked_bytes(model, parameters),
    }
    update = {
        "gradients": gradients,
        "reads and pooled values": kept,
        "rows of the largest table": _row_bytes(
            config, tokens * shards // groups.size(groups.replicas), row_multiple
        ),
    }
    return max(backward, update, key=lambda parts: sum(parts.values()))


def decoding_temporaries(
    model: ModelConfig, batch_size: int, cache_length: int, groups_experts: bool, by_ranks: bool = False
) -> dict[str, int]:
    """Returns the bytes of a decoding step's temporaries, by part; layers follow one after the other.

    Args:
        model: the model.
        batch_size: B.
        cache_length: U.
        groups_experts: the same as in `training_temporaries`.
        by_ranks: whether tokens are chosen by ranks in tiles (`ops.selection`). Then logits and probabilities
            are also there as ordered integers, and cut into tiles.
    """
    scores = batch_size * model.num_heads * cache_length
    return {
        "activations of a layer": batch_size * _layer_bytes(model),
        "attention weights": scores * 2 * FLOAT32_BYTES,
        "logits": (4 if by_ranks else 2) * FLOAT32_BYTES * batch_size * model.vocab_size,
        "choice of rows": FLOAT32_BYTES * batch_size * _choosing_width(model),
        "reads and pooled values": _kept_of_memories(model, batch_size),
        "weights of groups": _group_bytes(model, batch_size) if groups_experts else 0,
    }


def _group_bytes(model: ModelConfig, tokens: int) -> int:
    """Returns the weights of the experts of all groups, of two matrices at a time."""
    if model.moe is None:
        return 0
    assignments, experts = tokens * model.moe.top_k, model.moe.num_experts
    groups = assignments // group_rows(assignments, experts) + experts
    return 2 * groups * model.embed_dim * model.moe.expert_dim * DTYPE_BYTES[model.dtype]


def _layer_bytes(model: ModelConfig) -> int:
    """Returns what a layer keeps of a token, without attention weights.

    These are the inputs and results of both norms, queries, keys, values, pooled values (also in float32),
    and the inner activations of the MLP before and after their function. Of experts, each of the k has its
    rows.
    """
    b, d = DTYPE_BYTES[model.dtype], model.embed_dim
    q, kv = model.query_width, model.key_width
    attention = b * (4 * d + 2 * q + 2 * kv) + FLOAT32_BYTES * q
    inner = MLP_MATRICES[model.mlp]
    if model.moe is None:
        return attention + b * inner * model.mlp_dim
    inner = MLP_MATRICES[model.moe.activation]
    return attention + model.moe.top_k * b * (2 * d + inner * model.moe.expert_dim) + FLOAT32_BYTES * d


def _kept_bytes(model: ModelConfig, remat: str) -> int:
    """Returns what a layer keeps of a token with remat.

    That is its input; with `products` also the results of its products with weights: queries, keys, values,
    the output of attention, and those of the MLP. Products with experts' weights are computed again.
    """
    if remat == "layers":
        return DTYPE_BYTES[model.dtype] * model.embed_dim
    mlp = model.embed_dim + (MLP_MATRICES[model.mlp] - 1) * model.mlp_dim if model.moe is None else 0
    of_attention = model.embed_dim + model.query_width + 2 * model.key_width
    return DTYPE_BYTES[model.dtype] * (model.embed_dim + of_attention + mlp)


def _stacked_bytes(model: ModelConfig, parameters: Parameters) -> int:
    """Returns the weights that a scan over layers stacks: those of all layers, but for groups of one.

    Those of experts are float32.
    """
    matrices = parameters.attention + parameters.feed_forward + parameters.router
    of_layers = DTYPE_BYTES[model.dtype] * matrices + FLOAT32_BYTES * parameters.experts
    return of_layers * _scanned_layers(model) // model.num_layers


def _scanned_layers(model: ModelConfig) -> int:
    return sum(len(group) for group in model.layer_groups if len(group) > 1) if model.scan_layers else 0


def _loop_bytes(model: ModelConfig) -> int:
    """Returns what a scanned layer keeps of a token beside `_layer_bytes`.

    A compiler does not compute anything again across the loops of forward and backward pass. So the inner
    activations are there five times instead of twice, and norms keep three arrays in float32 (the program of
    `dense-680m` for an H100).
    """
    inner = model.mlp_dim if model.moe is None else model.moe.top_k * model.moe.expert_dim
    return 3 * (DTYPE_BYTES[model.dtype] * inner + FLOAT32_BYTES * model.embed_dim)


def _attention_bytes(model: ModelConfig, sequences: int, length: int) -> int:
    """Returns the attention weights of a layer: in float32, in the dtype, and whether dropout kept them."""
    allowed = (CAUSAL_CHUNKS + 1) / (2 * CAUSAL_CHUNKS)
    of_weight = FLOAT32_BYTES + DTYPE_BYTES[model.dtype] + (1 if model.dropout else 0)
    return round(sequences * model.num_heads * length**2 * allowed * of_weight)


def _kept_of_memories(model: ModelConfig, tokens: int) -> int:
    return sum(tokens * _memory_bytes(site) for site in model.sites)


def _memory_bytes(site: MemorySite) -> int:
    """Returns what a memory keeps of a token: what chose its rows, slots, blocks, weights, and pooled values.

    Pooled values have a cotangent of the same size, and so have products with pre-values.
    """
    memory, b = site.config, DTYPE_BYTES[site.context.dtype]
    pooled = memory.num_blocks * memory.table.value_dim
    reads = memory.reads_per_token * (2 * _INT32_BYTES + memory.address.weights_per_read * 2 * b)
    products = (
        2 * memory.reads_per_token + 2 * memory.table.pre_value_dim if memory.table.pre_value_dim else 0
    )
    return reads + b * (2 * pooled + products) + memory.address.kept_bytes(site)


def _choosing_width(model: ModelConfig) -> int:
    return max((site.config.address.choosing_width(site) for site in model.sites), default=0)


def _row_bytes(config: RunConfig, tokens: int, multiple: int) -> int:
    """Returns the arrays over all reads of the table that is read most, of all its parts side by side."""
    most = 0
    for readers in table_readers(config.model).values():
        memory = readers[0].config
        reads = tokens * config.train.grad_accumulation * memory.reads_per_token * len(readers)
        width = sum(-(-width // multiple) * multiple for width in memory.table.arrays.values())
        most = max(most, _ROW_ARRAYS * FLOAT32_BYTES * reads * width)
    return most
