"""Lists the tensors of an open model under the names of Hugging Face, and the variables that they are.

Hugging Face keeps linear maps as (out, in) and every expert as a tensor of its own; its rotary positions pair
feature i with i + d/2, as here.

Memories have no names there. In a folder that this project writes they are called

- `model.memories.NAME.PARAMETER`: dense parameters of the memory NAME (`ultramem_0`, ...), under their names
  and in their layout here;
- `model.memory_tables.TABLE.values` and `.pre_values`: rows of a table, (N, width);
- `model.memory_buffers.NAME.BUFFER`: what the memory keeps besides, such as signs of singular vectors, stored
  permutations, or the map from tokens to canonical ids.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import layer_name
from ultramem_jax.interop.entries import Entry, Path, transposed
from ultramem_jax.models import Transformer


class ExpertNames(NamedTuple):
    """Names the tensors of a Mixture of Experts within a layer."""

    module: str
    gate: str
    up: str
    down: str


EXPERTS = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL_EXPERTS = ExpertNames("block_sparse_moe", "w1", "w3", "w2")

_OF_MEMORIES = {"params": "memories", "memory": "memory_tables", "buffers": "memory_buffers"}
"""Collection -> the part of a name that stands for it."""


def entries(config: ModelConfig, experts: ExpertNames = EXPERTS) -> list[Entry]:
    """Returns the entries of all variables of a model, in the order of its layers; memories come last.

    Args:
        config: the model.
        experts: names of the experts' tensors.
    """
    width = config.embed_dim
    found = [_plain(("params", "embedding"), "model.embed_tokens.weight", (config.vocab_size, width))]
    for number in range(1, config.num_layers + 1):
        found += _of_layer(config, experts, number)
    found.append(_plain(("params", "final_norm", "scale"), "model.norm.weight", (width,)))
    if not config.tie_embeddings:
        found.append(_linear(("params", "output"), "lm_head.weight", config.vocab_size, width))
    return [*found, *(_of_memories(config) if config.memories else ())]


def _of_layer(config: ModelConfig, experts: ExpertNames, number: int) -> Iterator[Entry]:
    path: Path = ("params", layer_name(number))
    prefix = f"model.layers.{number - 1}"
    width = config.embed_dim
    yield _plain((*path, "attention_norm", "scale"), f"{prefix}.input_layernorm.weight", (width,))
    yield from _attention(config, (*path, "attention"), f"{prefix}.self_attn")
    name = f"{prefix}.post_attention_layernorm.weight"
    yield _plain((*path, "feed_forward_norm", "scale"), name, (width,))
    if number in config.feed_forward_layers:
        path = (*path, "feed_forward")
        if config.moe is None:
            names = {"w_in": "up_proj", "w_gate": "gate_proj", "w_out": "down_proj"}
            for name, (width_out, width_in) in _feed_forward(config.mlp, width, config.mlp_dim).items():
                yield _linear((*path, name), f"{prefix}.mlp.{names[name]}.weight", width_out, width_in)
        else:
            yield from _experts(config, experts, path, f"{prefix}.{experts.module}")


def _experts(config: ModelConfig, experts: ExpertNames, path: Path, prefix: str) -> Iterator[Entry]:
    moe = config.moe
    assert moe is not None
    yield _linear((*path, "router"), f"{prefix}.gate.weight", moe.num_experts, config.embed_dim)
    theirs = {"w_in": experts.up, "w_gate": experts.gate, "w_out": experts.down}
    for name, shape in _feed_forward(moe.activation, config.embed_dim, moe.expert_dim).items():
        names = tuple(f"{prefix}.experts.{i}.{theirs[name]}.weight" for i in range(moe.num_experts))
        yield Entry((*path, name), names, shape, transposed, transposed, axis=0)


def _feed_forward(kind: str, width: int, inner: int) -> dict[str, tuple[int, int]]:
    """Returns the matrices of an MLP or expert of a kind by name, as (out, in)."""
    shapes = {"w_in": (inner, width), "w_out": (width, inner)}
    return shapes | ({"w_gate": (inner, width)} if kind == "swiglu" else {})


def _attention(config: ModelConfig, path: Path, prefix: str) -> Iterator[Entry]:
    width, queries, keys = config.embed_dim, config.query_width, config.key_width
    shapes = {
        "query": (queries, width),
        "key": (keys, width),
        "value": (keys, width),
        "out": (width, queries),
    }
    letters = {"query": "q", "key": "k", "value": "v", "out": "o"}
    for name, shape in shapes.items():
        yield _linear((*path, f"w_{name}"), f"{prefix}.{letters[name]}_proj.weight", *shape)
    biased = {"none": (), "qkv": ("query", "key", "value"), "all": tuple(shapes)}[config.attention_bias]
    for name in biased:
        ours = "output_bias" if name == "out" else f"{name}_bias"
        yield _plain((*path, ours), f"{prefix}.{letters[name]}_proj.bias", shapes[name][:1])
    if config.attention_qk_norm != "none":
        per_head = config.attention_qk_norm == "per_head"
        for name, whole in (("query", queries), ("key", keys)):
            size = config.head_width if per_head else whole
            yield _plain((*path, f"{name}_norm", "scale"), f"{prefix}.{letters[name]}_norm.weight", (size,))


def _plain(path: Path, name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(path, (name,), shape)


def _linear(path: Path, name: str, width_out: int, width_in: int) -> Entry:
    return Entry(path, (name,), (width_out, width_in), transposed, transposed)


def _of_memories(config: ModelConfig) -> Iterator[Entry]:
    tokens = jnp.zeros((1, 2), jnp.int32)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    indices = {site.name: site.config.address.index_buffers(site) for site in config.sites}
    for collection, word in _OF_MEMORIES.items():
        modules = {site.name: None for site in config.sites} | {site.table: None for site in config.sites}
        for module in modules:
            for name, variable in variables.get(collection, {}).get(module, {}).items():
                path, full = (collection, module, name), f"model.{word}.{module}.{name}"
                if variable.dtype == jnp.uint16:  # rows in bfloat16 (`ops.rows`)
                    yield Entry(path, (full,), variable.shape, _bits, _from_bits)
                else:
                    whole = jnp.issubdtype(variable.dtype, jnp.integer)
                    entry = Entry(path, (full,), variable.shape, constant=whole)
                    bounds = indices.get(module, {})
                    yield replace(entry, index=True, limit=bounds[name]) if name in bounds else entry


def _bits(rows: np.ndarray) -> np.ndarray:
    return rows.astype(jnp.bfloat16).view(np.uint16)


def _from_bits(rows: np.ndarray) -> np.ndarray:
    return rows.view(jnp.bfloat16)
