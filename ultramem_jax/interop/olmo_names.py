"""Lists the tensors of an OLMo state dict, and the variables of `Transformer` that they become.

OLMo keeps linear maps as (out, in). `att_proj` holds queries, keys and values one behind the other, and
`ff_proj` the inner map of SwiGLU and then its gate. The experts of megablocks are stacked: `w1`, the gate,
`v1`, the inner map, and `w2`, the output map, are all (X·F, D).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import layer_name
from ultramem_jax.interop.entries import Entry, Path, transposed
from ultramem_jax.interop.names import TABLES, entries
from ultramem_jax.interop.olmo_config import OlmoModel

Pieces = list[tuple[Path, np.ndarray]]
"""Variables, each with its collection, modules and name."""


@dataclass(frozen=True)
class Stored:
    """Describes tensors of the state dict that are read together, and the variables that they hold."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    """Shape of the tensor under each name."""
    pieces: Callable[[Sequence[np.ndarray]], Pieces]
    """Makes the variables from the tensors."""
    permutation: bool = False
    """True for integers that name each of the addresses below their count once."""
    parts: int = 1
    """Number of files that hold columns of the tensor."""


def stored_tensors(model: OlmoModel) -> list[Stored]:
    """Returns all tensors of the state dict of a model, the tables of memories last."""
    config = model.config
    D, V = config.embed_dim, config.vocab_size
    found = [_same("transformer.wte.weight", (V, D), "embedding")]
    for number in range(config.num_layers):
        found += _layer(config, number)
    found.append(_same("transformer.ln_f.weight", (D,), "final_norm", "scale"))
    if not config.tie_embeddings:
        found.append(_linear("transformer.ff_out.weight", (V, D), "output"))
    return found + _memories(model)


def query_norm_name(number: int) -> str:
    """Returns the name of the gain of a layer's query norm; layers count from 0."""
    return f"transformer.blocks.{number}.q_norm.weight"


def _layer(config: ModelConfig, number: int) -> list[Stored]:
    """Returns the tensors of one layer, counted from 0."""
    D, A, A_kv = config.embed_dim, config.query_width, config.key_width
    prefix, layer = f"transformer.blocks.{number}.", layer_name(number + 1)
    attention = (layer, "attention")
    found = [
        _same(prefix + "attn_norm.weight", (D,), layer, "attention_norm", "scale"),
        _same(prefix + "ff_norm.weight", (D,), layer, "feed_forward_norm", "scale"),
        _split(prefix + "att_proj.weight", (A, A_kv, A_kv), D, attention, ("w_query", "w_key", "w_value")),
        _linear(prefix + "attn_out.weight", (D, A), *attention, "w_out"),
    ]
    if config.attention_qk_norm != "none":
        whole = config.attention_qk_norm == "all_heads"
        widths = (A, A_kv) if whole else (config.head_width,) * 2
        for name, module, width in zip(("q_norm", "k_norm"), ("query_norm", "key_norm"), widths, strict=True):
            found.append(_same(f"{prefix}{name}.weight", (width,), *attention, module, "scale"))
    return found + (_experts if config.moe else _mlp)(config, prefix, (layer, "feed_forward"))


def _mlp(config: ModelConfig, prefix: str, module: Path) -> list[Stored]:
    D, F = config.embed_dim, config.mlp_dim
    return [
        _split(prefix + "ff_proj.weight", (F, F), D, module, ("w_in", "w_gate")),
        _linear(prefix + "ff_out.weight", (D, F), *module, "w_out"),
    ]


def _experts(config: ModelConfig, prefix: str, module: Path) -> list[Stored]:
    assert config.moe is not None
    D, X, F = config.embed_dim, config.moe.num_experts, config.moe.expert_dim

    def stacked(name: str, variable: str, order: tuple[int, ...]) -> Stored:
        def pieces(arrays: Sequence[np.ndarray]) -> Pieces:
            return [(("params", *module, variable), arrays[0].reshape(X, F, D).transpose(order))]

        return Stored((f"{prefix}ffn.experts.mlp.{name}",), (X * F, D), pieces)

    return [
        _linear(prefix + "ffn.router.layer.weight", (X, D), *module, "router"),
        stacked("w1", "w_gate", (0, 2, 1)),
        stacked("v1", "w_in", (0, 2, 1)),
        stacked("w2", "w_out", (0, 1, 2)),
    ]


def _memories(model: OlmoModel) -> list[Stored]:
    """Returns the tensors of all memories. Each V1 layer is by itself; other layers share one table."""
    if model.reference is None:
        return []
    sites, of_layer = model.config.sites, entries(model.reference)
    if model.reference.stacked:
        modules = {site.name: site.name for site in sites} | {TABLES: sites[0].table}
        return [_of_memory(entry, model, "transformer.", modules) for entry in of_layer]
    own = model.reference.sites[0].name
    found = []
    for site in sites:
        prefix, modules = f"transformer.mem_blocks.{site.index}.", {own: site.name, TABLES: site.table}
        found += [_of_memory(entry, model, prefix, modules) for entry in of_layer]
    return found


def _of_memory(entry: Entry, model: OlmoModel, prefix: str, modules: dict[str, str]) -> Stored:
    """Returns an entry of a layer's own state dict as it is in that of the model."""
    collection, module, name = entry.path
    path, kept = (collection, modules[module], name), model.queries_kept
    if name == "query" and kept is not None:
        ranks = model.reference.address.num_ranks if model.reference else 1
        shape = (ranks * kept, entry.shape[1])
        entry = replace(entry, shape=shape, to_variable=lambda matrix: transposed(matrix[:kept]))
    # The layer declares no scale for keys that it does not norm: those of Memory+.
    declared = collection != "params" or name in model.config.sites[0].parameters

    def pieces(arrays: Sequence[np.ndarray]) -> Pieces:
        return [(path, entry.pack(arrays))] if declared else []

    names = tuple(prefix + one for one in entry.names)
    return Stored(names, entry.shape, pieces, entry.constant, model.table_parts if module == TABLES else 1)


def _same(name: str, shape: tuple[int, ...], *path: str) -> Stored:
    """Returns a tensor that is a parameter as it is."""
    return Stored((name,), shape, lambda arrays: [(("params", *path), arrays[0])])


def _linear(name: str, shape: tuple[int, int], *path: str) -> Stored:
    """Returns the matrix of a linear map, (out, in)."""
    return Stored((name,), shape, lambda arrays: [(("params", *path), transposed(arrays[0]))])


def _split(name: str, heights: tuple[int, ...], width: int, module: Path, parts: tuple[str, ...]) -> Stored:
    """Returns the matrices of several linear maps of the same input, one below the other."""
    ends = np.cumsum(heights)[:-1]

    def pieces(arrays: Sequence[np.ndarray]) -> Pieces:
        matrices = zip(parts, np.split(arrays[0], ends), strict=True)
        return [(("params", *module, part), transposed(matrix)) for part, matrix in matrices]

    return Stored((name,), (sum(heights), width), pieces)
