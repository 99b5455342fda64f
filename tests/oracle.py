"""A memory layer in float64 NumPy, written from its definition: token by token, nothing shared with the code.

The whole virtual grid is scored, the expanded tables Ṽ_p = V·W_p are built, and loops run where the layer has
matrix products.
"""

import numpy as np

from ultramem_jax.config import MemoryConfig


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + eps) * scale


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest values, best first."""
    return np.argsort(-values, kind="stable")[:count]


def tucker_cells(row, column, core, u, t, top_m):
    """The chosen cells of S_rowᵀ·C·S_col among the candidates; row and column are (r, K)."""
    rows, columns = best(u @ row, top_m), best(t @ column, top_m)
    grid = row.T @ core @ column
    cells = sorted(((grid[i, j], i, j) for i in rows for j in columns), reverse=True)[:top_m]
    return [(i, j) for _, i, j in cells]


def product_key_cells(row, column, top_m):
    """The top_m cells of row[i] + column[j] over all K·K."""
    grid = row[:, None] + column
    return [divmod(cell, len(column)) for cell in best(grid.ravel(), top_m)]


def leading_vectors(core, last_u, last_t):
    left, _, right = np.linalg.svd(core)
    u, t = left[:, 0], right[0]
    closer = np.sum((u - last_u) ** 2) + np.sum((t - last_t) ** 2)
    mirrored = np.sum((-u - last_u) ** 2) + np.sum((-t - last_t) ** 2)
    return (u, t) if closer <= mirrored else (-u, -t)


def memory_layer(config: MemoryConfig, variables: dict, x: np.ndarray, block_and_slot, eps: float = 1e-5):
    """The output (B, S, D) of `ProductKeyMemory` for x (B, S, D).

    Args:
        config: of the layer.
        variables: its `params`, `memory` and `buffers`.
        x: float64.
        block_and_slot: (row, column) -> (p, a), the addressing, tested on its own.
        eps: of the norms.
    """
    p = {k: np.asarray(v, np.float64) for k, v in variables["params"].items()}
    table = np.asarray(variables["memory"]["values"], np.float64)
    heads, ranks, d_k = config.num_heads, max(config.tucker_rank, 1), config.key_dim
    batch, length, embed_dim = x.shape
    slice_width = config.value_dim // config.num_cores
    if config.project_values:
        projectors = p["projection"].reshape(config.expansion, config.value_dim, embed_dim)
    else:
        projectors = np.eye(embed_dim)[None]
    y = np.zeros_like(x)
    for b in range(batch):
        for s in range(length):
            seen = x[b, s]
            if config.query_conv_width:
                back = range(min(config.query_conv_width, s + 1))
                seen = sum(p["query_conv"][i] * x[b, s - i] for i in back)
            queries = (seen @ p["query"]).reshape(2, config.num_queries, d_k)
            for head in range(heads):
                sides = []
                for side in range(2):
                    query = queries[side, 0 if config.share_query else head]
                    keys = p["keys"][side, head]  # (r, K, d)
                    if config.norm_query_key:
                        query = rms_norm(query, p["query_scale"], eps)
                    scores = np.zeros((ranks, config.num_virtual_keys))
                    for k in range(config.num_virtual_keys):
                        for rank in range(ranks):
                            if config.rank_keys == "split":
                                key = keys[:, k].reshape(d_k)
                                part = slice(rank * d_k // ranks, (rank + 1) * d_k // ranks)
                            else:
                                key, part = keys[rank, k], slice(None)
                            if config.norm_query_key:
                                key = rms_norm(key, p["key_scale"], eps)
                            scores[rank, k] = query[part] @ key[part]
                    sides.append(scores)
                row, column = sides
                if config.tucker_rank:
                    cores = p["cores"][head]
                    last = [
                        np.asarray(variables["buffers"][f"{n}_direction"])[head] for n in ("row", "column")
                    ]
                    u, t = leading_vectors(cores.sum(0), *last)
                    cells = tucker_cells(row, column, cores.sum(0), u, t, config.top_m)
                    weights = np.array([[row[:, i] @ c @ column[:, j] for c in cores] for i, j in cells])
                else:
                    cells = product_key_cells(row[0], column[0], config.top_m)
                    weights = np.array([[row[0, i] + column[0, j]] for i, j in cells])
                if config.softmax:
                    weights = np.exp(weights - weights.max(0))
                    weights /= weights.sum(0)
                for (i, j), weight in zip(cells, weights, strict=True):
                    block, slot = block_and_slot(i, j)
                    value = table[slot] * np.repeat(weight, slice_width)
                    y[b, s] += value @ projectors[block]
    return y
