"""Cases of kernels that choose and score keys and cells, and that hash n-grams."""

import numpy as np

from tests.support.kernel_case import Case, computed, integers, normal, tolerance
from ultramem_jax.kernels import calls


def ranks(x):
    """Integers in the order of `jax.lax.top_k`."""
    bits = x.view(np.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64)


def best(x, k):
    """Indices of the k largest along the last axis, in that order."""
    return np.argsort(-ranks(x), axis=-1, kind="stable")[..., :k]


def top_k(draw):
    rows, length = draw.integer(1, 20), draw.choice([draw.integer(1, 70), draw.integer(71, 3000)])
    k = draw.integer(1, min(length, 150))
    x = draw.choice([normal, integers, lambda d, *s: np.zeros(s, np.float32)])(draw, rows, length)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-42, -1e-42, np.finfo(np.float32).max]
    for _ in range(draw.integer(0, 12)):
        x[draw.rng.random(x.shape) < 0.1] = draw.choice(special)
    if draw.integer(0, 9) == 0:
        x.view(np.uint32)[...] |= np.uint32(
            draw.choice([0x7FFFFFFF, 0xFFFFFFFF])
        )  # NaN of both extreme ranks
    index = best(x, k)
    return Case(calls.top_k, (x,), {"k": k}, [np.take_along_axis(x, index, -1), index])


def _retrieval(draw, tokens):
    heads, rank, width = draw.integer(1, 3), draw.integer(1, 4), draw.choice([1, 4, 8, 12, 16, 33])
    sets, query_ranks = draw.choice([1, heads]), draw.choice([1, rank])
    num_keys = draw.choice([draw.integer(1, 40), draw.integer(41, 1400)])
    return (tokens, 2, heads, query_ranks, width), (2, sets, rank, num_keys, width)


def _wide(queries, keys):
    """Queries and keys with every head and rank, in float64."""
    heads, rank = queries.shape[2], keys.shape[2]
    queries = np.broadcast_to(queries, (*queries.shape[:3], rank, queries.shape[4]))
    return queries.astype(np.float64), np.broadcast_to(keys, (2, heads, *keys.shape[2:])).astype(np.float64)


def _all_scores(queries, keys):
    return np.einsum("tahrd,ahrkd->tahrk", *_wide(queries, keys))


def best_keys(draw):
    query_shape, key_shape = _retrieval(draw, draw.choice([1, 3, 16, 17, draw.integer(100, 200)]))
    queries, _ = computed(draw, integers(draw, *query_shape))
    keys = integers(draw, *key_shape).astype(queries.dtype)
    directions = draw.rng.choice(np.float32([-1, 0.5, 1]), (2, query_shape[2], key_shape[2]))
    top_m = draw.integer(1, min(key_shape[3], 96))
    scores = np.einsum("tahrk,ahr->tahk", _all_scores(queries, keys), directions)
    expected = best((scores + 0.0).astype(np.float32), top_m)
    return Case(calls.best_keys, (queries, keys, directions), {"top_m": top_m}, [expected])


def _chosen(draw, query_shape, key_shape):
    top_m = draw.integer(1, min(key_shape[3], 20))
    shape = (*query_shape[:3], top_m)
    return draw.rng.integers(0, key_shape[3], shape).astype(np.int32)


def key_scores(draw):
    query_shape, key_shape = _retrieval(draw, draw.integer(1, 40))
    queries, _ = computed(draw, normal(draw, *query_shape))
    keys = normal(draw, *key_shape).astype(queries.dtype)
    index = _chosen(draw, query_shape, key_shape)
    expected = np.take_along_axis(_all_scores(queries, keys), index[:, :, :, None], axis=-1)
    return Case(calls.key_scores, (queries, keys, index), {}, [expected], 2e-6)


def _gradient_case(draw):
    query_shape, key_shape = _retrieval(draw, draw.integer(1, 40))
    queries, _ = computed(draw, normal(draw, *query_shape))
    keys = normal(draw, *key_shape).astype(queries.dtype)
    index = _chosen(draw, query_shape, key_shape)
    cotangent = normal(draw, *index.shape[:3], key_shape[2], index.shape[3])
    # The cotangent of all scores: (T, 2, H, r, K), of which few are not zero.
    whole = np.zeros((*cotangent.shape[:4], key_shape[3]))
    t, a, h, r, j = np.ix_(*map(np.arange, cotangent.shape))
    np.add.at(whole, (t, a, h, r, index[t, a, h, j]), cotangent)
    return queries, keys, index, cotangent, whole


def query_gradient(draw):
    queries, keys, index, cotangent, whole = _gradient_case(draw)
    gradient = np.einsum("tahrk,ahrkd->tahrd", whole, _wide(queries, keys)[1])
    if queries.shape[3] == 1:
        gradient = gradient.sum(3, keepdims=True)
    options = {"query_ranks": queries.shape[3]}
    return Case(calls.query_gradient, (cotangent, index, keys), options, [gradient], tolerance(queries))


def key_gradient(draw):
    queries, keys, index, cotangent, whole = _gradient_case(draw)
    gradient = np.einsum("tahrk,tahrd->ahrkd", whole, _wide(queries, keys)[0])
    if keys.shape[1] == 1:
        gradient = gradient.sum(1, keepdims=True)
    return Case(calls.key_gradient, (cotangent, index, queries), {"keys": keys.shape}, [gradient], 2e-6)


def _keys_to_norm(draw):
    """Keys and their gain; the mean square of every key; keys with room for all parts, in float64."""
    ranks, sets, num_keys = draw.integer(1, 3), draw.integer(1, 2), draw.choice([1, 5, 300])
    width, eps = draw.choice([1, 4, 16, 40, 33]), draw.choice([1e-5, 0.5])
    keys = normal(draw, 2, sets, ranks, num_keys, width)
    gain = normal(draw, draw.choice([1, ranks]), width)
    parts = keys.reshape(-1, len(gain), num_keys, width).astype(np.float64)
    return keys, gain, parts, 1 / np.sqrt((parts**2).mean((1, 3), keepdims=True) + eps), eps


def rms_norm(draw):
    keys, gain, parts, inverse, eps = _keys_to_norm(draw)
    normed = (parts * inverse * gain[:, None]).reshape(keys.shape)
    return Case(calls.rms_norm, (keys, gain), {"eps": eps}, [normed], 2e-6)


def rms_norm_gradient(draw):
    keys, gain, parts, inverse, eps = _keys_to_norm(draw)
    cotangent = normal(draw, *keys.shape)
    back = cotangent.reshape(parts.shape).astype(np.float64)
    own = back * gain[:, None]
    d_keys = inverse * own - inverse**3 * parts * (own * parts).mean((1, 3), keepdims=True)
    d_gain = (back * parts * inverse).sum((0, 2))

    def compare(found, wanted):
        # Of narrow keys the two terms cancel almost. Their sum is as exact as they are.
        atol = 3e-6 * np.abs(inverse * own).max()
        np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=atol)

    expected = [d_keys.reshape(keys.shape), d_gain]
    arrays, options = (cotangent, keys, gain), {"eps": eps}
    return Case(calls.rms_norm_gradient, arrays, options, expected, 3e-6, {0: compare})


def _cells(draw, numbers):
    tokens, heads, m = draw.integer(1, 30), draw.integer(1, 3), draw.integer(1, 40)
    rank = draw.integer(1, 4)
    if draw.integer(0, 2) == 0:
        scores, cores = numbers(draw, tokens, 2, heads, 1, m), np.zeros((heads, 0, 1, 1), np.float32)
    else:
        scores = numbers(draw, tokens, 2, heads, rank, m)
        cores = numbers(draw, heads, draw.integer(1, 3), rank, rank)
    return scores, cores, draw.integer(1, min(m * m, 96))


def _grids(scores, cores):
    """Scores of all cells, (T, H, h, m·m) in float64."""
    row, column = scores[:, 0].astype(np.float64), scores[:, 1].astype(np.float64)
    if not cores.shape[1]:
        grid = row[:, :, 0, :, None] + column[:, :, 0, None, :]
        return grid.reshape(*grid.shape[:2], 1, -1)
    grid = np.einsum("thqi,hcqs,thsj->thcij", row, cores.astype(np.float64), column)
    return grid.reshape(*grid.shape[:3], -1)


def _of_cells(grids, cells):
    return np.moveaxis(np.take_along_axis(grids, cells[:, :, None], -1), 2, -1)


def best_cells(draw):
    scores, cores, top_m = _cells(draw, integers)
    grids = _grids(scores, cores)
    cells = best((grids.sum(2) + 0.0).astype(np.float32), top_m)
    return Case(calls.best_cells, (scores, cores), {"top_m": top_m}, [cells, _of_cells(grids, cells)])


def best_cells_gradient(draw):
    scores, cores, top_m = _cells(draw, normal)
    tokens, _, heads, _, m = scores.shape
    cells = draw.rng.integers(0, m * m, (tokens, heads, top_m)).astype(np.int32)
    cotangent = normal(draw, tokens, heads, top_m, max(cores.shape[1], 1))
    d_scores, d_cores = np.zeros(scores.shape), np.zeros(cores.shape)
    wide = scores.astype(np.float64)
    for t, h, cell in np.ndindex(*cells.shape):
        i, j = divmod(int(cells[t, h, cell]), m)
        row, column = wide[t, 0, h, :, i], wide[t, 1, h, :, j]
        for core, weight in enumerate(cotangent[t, h, cell].astype(np.float64)):
            matrix = cores[h, core].astype(np.float64) if cores.shape[1] else None
            d_scores[t, 0, h, :, i] += weight * (1 if matrix is None else matrix @ column)
            d_scores[t, 1, h, :, j] += weight * (1 if matrix is None else row @ matrix)
            if matrix is not None:
                d_cores[h, core] += weight * np.outer(row, column)
    arrays = (cotangent, cells, scores, cores)
    return Case(calls.best_cells_gradient, arrays, {}, [d_scores, d_cores], 3e-6)


def ngram_slots(draw):
    orders = draw.choice([(1,), (2, 3), (1, 2, 4), (3,)])
    per_order, span = draw.integer(1, 4), max(orders)
    sizes = tuple(int(s) for s in draw.rng.integers(1, 2**31 - 1, len(orders) * per_order))
    window = draw.rng.integers(0, 2**31 - 1, (draw.integer(1, 4), span - 1 + draw.integer(1, 300))).astype(
        np.int32
    )
    multipliers = draw.rng.integers(-(2**63), 2**63 - 1, span)
    length = window.shape[1] - span + 1
    slots, hashed = [], np.zeros((len(window), length), np.int64)
    with np.errstate(over="ignore"):
        for back in range(span):
            hashed = hashed ^ window[:, span - 1 - back :][:, :length].astype(np.int64) * multipliers[back]
            if back + 1 in orders:
                of_order = sizes[orders.index(back + 1) * per_order :][:per_order]
                slots += [hashed % size for size in of_order]
    options = {"multipliers": multipliers, "sizes": sizes, "orders": orders}
    return Case(calls.ngram_slots, (window,), options, [np.stack(slots, -1)])
