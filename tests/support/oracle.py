"""Computes memory layers in float64 NumPy, from their definitions: token by token, without the package.

One function, `memory_layer`, is every member of the family: Product-Key Memory, UltraMem, UltraMemV2, Memory+
and PEER. The whole virtual grid is scored where the layer scores candidates, and every value that is read
goes through the projector of its own block, as in the expanded tables Ṽ_p = V·W_p; the layer pools first.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ultramem_jax.config import MemoryConfig

Cell = tuple[int, int]


def float64(arrays: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in arrays.items()}


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Returns one vector over its root mean square, times its gain."""
    return x / np.sqrt((x**2).mean() + eps) * scale


def softmax(x: np.ndarray) -> np.ndarray:
    """Returns the softmax over the first axis."""
    e = np.exp(x - x.max(0))
    return e / e.sum(0)


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the largest values, best first."""
    return np.argsort(-values, kind="stable")[:count]


def tucker_cells(row, column, core, u, t, top_m) -> list[Cell]:
    """Returns the chosen cells of S_rowᵀ·C·S_col among the candidates; row and column are (r, K)."""
    rows, columns = best(u @ row, top_m), best(t @ column, top_m)
    grid = row.T @ core @ column
    cells = sorted(((grid[i, j], i, j) for i in rows for j in columns), reverse=True)[:top_m]
    return [(i, j) for _, i, j in cells]


def product_key_cells(row, column, top_m) -> list[Cell]:
    """Returns the top_m cells of row[i] + column[j] over all K·K."""
    grid = row[:, None] + column
    return [divmod(cell, len(column)) for cell in best(grid.ravel(), top_m)]


def leading_vectors(core, last_u, last_t):
    """Returns u and t of the largest singular value, with the signs that are closer to the last."""
    left, _, right = np.linalg.svd(core)
    u, t = left[:, 0], right[0]
    closer = np.abs(u - last_u).sum() + np.abs(t - last_t).sum()
    mirrored = np.abs(-u - last_u).sum() + np.abs(-t - last_t).sum()
    return (u, t) if closer <= mirrored else (-u, -t)


def seen_by_query(p: dict, x: np.ndarray, s: int) -> np.ndarray:
    """Returns token s of x (S, D), or its causal depthwise convolution: tap i looks i back."""
    if "query_conv" not in p:
        return x[s]
    return sum(tap * x[s - i] for i, tap in enumerate(p["query_conv"]) if i <= s)


def head_queries(config: MemoryConfig, p: dict, seen: np.ndarray, head: int, eps: float) -> list:
    """Returns queries[side][rank], each as wide as the keys of a rank."""
    heads = 1 if config.address.share_query else config.address.num_heads
    ranks = max(config.address.tucker_rank, 1)
    of_its_own = ranks if config.address.query_per_rank else 1
    columns = (seen @ p["query"]).reshape(2, heads, of_its_own, config.address.key_dim)
    queries = []
    for side in range(2):
        wide = list(columns[side, 0 if config.address.share_query else head])
        if config.address.norm_query:
            wide = [rms_norm(query, p["query_scale"], eps) for query in wide]
        if config.address.rank_keys == "split":
            queries.append(np.split(wide[0], ranks))
        else:
            queries.append(wide if config.address.query_per_rank else wide * ranks)
    return queries


def head_keys(config: MemoryConfig, p: dict, head: int, eps: float) -> np.ndarray:
    """Returns the keys of a head (2, r, K, d)."""
    keys = p["keys"][:, 0 if config.address.share_keys else head].copy()
    if not config.address.norm_keys:
        return keys
    _, ranks, num_keys, width = keys.shape
    for side in range(2):
        for k in range(num_keys):
            if config.address.rank_keys == "split":  # one key of width d_k, its parts side by side
                whole = rms_norm(keys[side, :, k].reshape(-1), p["key_scale"], eps)
                keys[side, :, k] = whole.reshape(ranks, width)
            else:
                for rank in range(ranks):
                    keys[side, rank, k] = rms_norm(keys[side, rank, k], p["key_scale"], eps)
    return keys


class Scored(NamedTuple):
    """Holds what one head makes of one token, before anything is chosen."""

    b: int
    s: int
    head: int
    row: np.ndarray
    """(r, K)."""
    column: np.ndarray
    """(r, K)."""
    u: np.ndarray
    """(r,), with `t` what candidates are chosen by; ones without a Tucker core."""
    t: np.ndarray


def scored(config: MemoryConfig, variables: dict, x: np.ndarray, eps: float) -> Iterator[Scored]:
    """Yields the scores of every token and head."""
    p = float64(variables["params"])
    for head in range(config.address.num_heads):
        keys = head_keys(config, p, head, eps)
        u = t = np.ones(1)
        if config.address.tucker_rank:
            last = float64(variables["buffers"])
            last_u, last_t = last["row_direction"][head], last["column_direction"][head]
            u, t = leading_vectors(p["cores"][head].sum(0), last_u, last_t)
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                queries = head_queries(config, p, seen_by_query(p, x[b], s), head, eps)
                row, column = (
                    np.array([k @ q for k, q in zip(keys[side], queries[side], strict=True)])
                    for side in range(2)
                )
                yield Scored(b, s, head, row, column, u, t)


def chosen(config: MemoryConfig, p: dict, found: Scored) -> tuple[list[Cell], np.ndarray]:
    """Returns the m cells and their scores (m, h)."""
    row, column, m = found.row, found.column, config.address.top_m
    if config.address.tucker_rank:
        cores = p["cores"][found.head]
        cells = tucker_cells(row, column, cores.sum(0), found.u, found.t, m)
        scores = np.array([[row[:, i] @ core @ column[:, j] for core in cores] for i, j in cells])
    else:
        cells = product_key_cells(row[0], column[0], m)
        scores = np.array([[row[0, i] + column[0, j]] for i, j in cells])
    return cells, softmax(scores) if config.address.softmax else scores


def inner_value(config: MemoryConfig, p: dict, u: np.ndarray, x: np.ndarray) -> float:
    """Returns act(u·p), the output of an expert of inner width 1 for the token x; u is its pre-value."""
    dot = float(u @ (x @ p["pre_projection"] if config.table.project_pre_values else x))
    return gelu(dot) if config.table.pre_value_activation == "gelu" else dot


def projectors(config: MemoryConfig, p: dict, embed_dim: int) -> list[np.ndarray]:
    """Returns a projector (d_v, D) for each of the E blocks."""
    if not config.readout.project_values:
        return [np.eye(embed_dim)]
    if config.readout.sum_blocks:
        return [p["projection"]] * config.address.expansion
    return list(p["projection"].reshape(config.address.expansion, config.table.value_dim, embed_dim))


def memory_layer(
    config: MemoryConfig,
    variables: dict,
    x: np.ndarray,
    block_and_slot: Callable[[int, int], tuple[int, int]],
    tables: dict | None = None,
    eps: float = 1e-5,
) -> np.ndarray:
    """Returns the output (B, S, D) of a `Memory` of product keys for x (B, S, D).

    Args:
        config: the layer's config.
        variables: its `params`, `buffers` and, unless it shares a table, `memory`.
        x: float64.
        block_and_slot: (row, column) -> (p, a), a row of the table: the addressing, tested on its own.
        tables: `values` and `pre_values`, where the layer does not own them.
        eps: epsilon of the norms.
    """
    p, tables = float64(variables["params"]), float64(tables or variables["memory"])
    through = projectors(config, p, x.shape[-1])
    y = np.zeros_like(x)
    for found in scored(config, variables, x, eps):
        token = x[found.b, found.s]
        for cell, weight in zip(*chosen(config, p, found), strict=True):
            block, slot = block_and_slot(*cell)
            if config.table.pre_value_dim:
                weight = weight * inner_value(config, p, tables["pre_values"][slot], token)
            value = tables["values"][slot] * np.repeat(
                weight, config.table.value_dim // config.address.num_cores
            )
            if config.readout.gate:
                gate = token @ p["gate"]
                value = value * gate / (1 + np.exp(-gate))
            y[found.b, found.s] += value @ through[block]
    return y


def balance_loss(config: MemoryConfig, variables: dict, x: np.ndarray, eps: float = 1e-5) -> float:
    """Returns Σ over both sides of K·Σ_i f_i·p_i, without its weight β.

    f_i is the share of key i among the m candidates of all tokens and heads, p_i the mean over them of a
    softmax over the K scores that the candidates are chosen by.
    """
    loss = 0.0
    for side in range(2):
        selections, probabilities = [], []
        for found in scored(config, variables, x, eps):
            scores = found.t @ found.column if side else found.u @ found.row
            selections.extend(best(scores, config.address.top_m))
            probabilities.append(softmax(scores))
        p = np.mean(probabilities, axis=0)
        f = np.array([selections.count(i) for i in range(len(p))]) / len(selections)
        loss += len(p) * float(f @ p)
    return loss
