"""Cases for native kernels: calls with random shapes and numbers, and what NumPy in float64 makes of them.

Where a kernel must be right to the bit, numbers are small integers: their sums are exact, and often equal.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from tests.support import row_updates
from ultramem_jax.kernels import calls
from ultramem_jax.kernels.rules import RULES, RowKernel

BFLOAT16 = ml_dtypes.bfloat16


class RandomDraw:
    """Draws numbers of a case from a seed. Hypothesis has a class of its own, with the same methods."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def integer(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def choice(self, options):
        return options[self.integer(0, len(options) - 1)]


@dataclass
class Case:
    """A call of a kernel."""

    function: Callable[..., Any]
    """A function of `calls`."""
    arrays: tuple[Any, ...]
    """Arrays, or trees of them."""
    options: dict[str, Any]
    """Other arguments."""
    expected: list[Any]
    """Results, in float64; None where a result is not compared."""
    tolerance: float = 0.0
    """Largest difference, relative to the largest number of a result; 0 for equality to the bit."""
    compare: dict[int, Callable[[np.ndarray, Any], None]] = field(default_factory=dict)
    """Results, by number, that something else than `tolerance` compares."""


def _integers(draw, *shape, bound=3):
    return draw.rng.integers(-bound, bound + 1, shape).astype(np.float32)


def _normal(draw, *shape):
    return draw.rng.standard_normal(shape).astype(np.float32)


def normal_with_nan(draw, *shape):
    """A few of the numbers are NaN."""
    x = _normal(draw, *shape)
    x[draw.rng.random(shape) < 0.02] = np.nan
    return x


def _computed(draw, x):
    """An array in the dtype of a computation, and the same in float64."""
    x = x.astype(draw.choice([np.float32, BFLOAT16]))
    return x, x.astype(np.float64)


def _tolerance(*arrays):
    return 1e-2 if any(a.dtype == BFLOAT16 for a in arrays) else 2e-6


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
    x = draw.choice([_normal, _integers, lambda d, *s: np.zeros(s, np.float32)])(draw, rows, length)
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
    queries, _ = _computed(draw, _integers(draw, *query_shape))
    keys = _integers(draw, *key_shape).astype(queries.dtype)
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
    queries, _ = _computed(draw, _normal(draw, *query_shape))
    keys = _normal(draw, *key_shape).astype(queries.dtype)
    index = _chosen(draw, query_shape, key_shape)
    expected = np.take_along_axis(_all_scores(queries, keys), index[:, :, :, None], axis=-1)
    return Case(calls.key_scores, (queries, keys, index), {}, [expected], 2e-6)


def _gradient_case(draw):
    query_shape, key_shape = _retrieval(draw, draw.integer(1, 40))
    queries, _ = _computed(draw, _normal(draw, *query_shape))
    keys = _normal(draw, *key_shape).astype(queries.dtype)
    index = _chosen(draw, query_shape, key_shape)
    cotangent = _normal(draw, *index.shape[:3], key_shape[2], index.shape[3])
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
    return Case(calls.query_gradient, (cotangent, index, keys), options, [gradient], _tolerance(queries))


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
    keys = _normal(draw, 2, sets, ranks, num_keys, width)
    gain = _normal(draw, draw.choice([1, ranks]), width)
    parts = keys.reshape(-1, len(gain), num_keys, width).astype(np.float64)
    return keys, gain, parts, 1 / np.sqrt((parts**2).mean((1, 3), keepdims=True) + eps), eps


def rms_norm(draw):
    keys, gain, parts, inverse, eps = _keys_to_norm(draw)
    normed = (parts * inverse * gain[:, None]).reshape(keys.shape)
    return Case(calls.rms_norm, (keys, gain), {"eps": eps}, [normed], 2e-6)


def rms_norm_gradient(draw):
    keys, gain, parts, inverse, eps = _keys_to_norm(draw)
    cotangent = _normal(draw, *keys.shape)
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
    scores, cores, top_m = _cells(draw, _integers)
    grids = _grids(scores, cores)
    cells = best((grids.sum(2) + 0.0).astype(np.float32), top_m)
    return Case(calls.best_cells, (scores, cores), {"top_m": top_m}, [cells, _of_cells(grids, cells)])


def best_cells_gradient(draw):
    scores, cores, top_m = _cells(draw, _normal)
    tokens, _, heads, _, m = scores.shape
    cells = draw.rng.integers(0, m * m, (tokens, heads, top_m)).astype(np.int32)
    cotangent = _normal(draw, tokens, heads, top_m, max(cores.shape[1], 1))
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


def _table(draw, rows, width):
    """A table as it is stored, and its numbers."""
    numbers = _normal(draw, rows, width)
    if draw.choice([False, True]):
        halves = numbers.astype(BFLOAT16)
        return halves.view(np.uint16), halves.astype(np.float64)
    return numbers, numbers.astype(np.float64)


def _lookup(draw):
    tokens, reads, slices = draw.integer(1, 30), draw.integer(1, 20), draw.integer(1, 3)
    width, rows = slices * draw.choice([1, 3, 8, 16, 40]), draw.integer(1, 60)
    apart = draw.integer(0, 4) == 0
    blocks = reads if apart else draw.integer(1, 5)
    of_reads = (
        np.tile(np.arange(reads), (tokens, 1)) if apart else draw.rng.integers(0, blocks, (tokens, reads))
    )
    # A device may own only some of the rows.
    first = draw.choice([0, draw.integer(0, 50)])
    slots = draw.rng.integers(0, rows if not first else rows + 2 * first, (tokens, reads)).astype(np.int32)
    table, numbers = _table(draw, rows, width)
    owned = (slots >= first) & (slots < first + rows)
    read = np.where(owned[..., None], numbers[np.clip(slots - first, 0, rows - 1)], 0)
    options = {"apart": apart, "first": first}
    return table, slots, of_reads.astype(np.int32), read, blocks, slices, options


def pool(draw):
    table, slots, blocks, read, expansion, slices, options = _lookup(draw)
    scores, wide = _computed(draw, _normal(draw, *slots.shape, slices))
    weighed = read * np.repeat(wide, table.shape[1] // slices, axis=2)
    pooled = np.einsum("tje,tjd->ted", blocks[..., None] == np.arange(expansion), weighed)
    arrays = (table, slots, blocks, scores)
    return Case(calls.pool, arrays, {"expansion": expansion} | options, [pooled], _tolerance(scores))


def products(draw):
    table, slots, blocks, read, expansion, slices, options = _lookup(draw)
    vectors, wide = _computed(draw, _normal(draw, len(slots), expansion, table.shape[1]))
    of_reads = np.take_along_axis(wide, blocks[..., None], axis=1)
    found = (read * of_reads).reshape(*slots.shape, slices, -1).sum(-1)
    arrays = (table, slots, blocks, vectors)
    return Case(calls.products, arrays, {"cores": slices} | options, [found], _tolerance(vectors))


def reads_of(slots, num_slots):
    """Returns the fields of `ops.lookup.rows_read`, from NumPy's sort."""
    rows, counts = np.unique(slots, return_counts=True)
    length = min(slots.size, num_slots)
    padded = np.concatenate([rows, num_slots + np.arange(len(rows), length)])
    order = np.argsort(slots, kind="stable")
    row_of_read = np.searchsorted(rows, slots[order])
    found = padded, np.pad(counts, (0, length - len(rows))), order, row_of_read
    return [a.astype(np.int32) for a in found]


def rows_read(draw):
    num_slots = draw.choice([1, draw.integer(2, 50), draw.integer(51, 5000), 2**24 + 3, 2**31 - 1])
    slots = draw.rng.integers(0, min(num_slots, draw.choice([40, num_slots])), draw.integer(1, 700))
    slots = slots.astype(np.int32)
    return Case(calls.rows_read, (slots,), {"num_slots": num_slots}, reads_of(slots, num_slots))


def record_reads(draw):
    num_slots, seen = draw.integer(1, 300), None
    slots = draw.rng.integers(0, num_slots, draw.integer(1, 700))
    seen = draw.rng.random(num_slots) < 0.5
    rows, counts, _, _ = reads_of(slots, num_slots)
    after = seen.copy()
    after[np.unique(slots)] = True
    share = counts[counts > 0] / slots.size
    entropy = -(share * np.log(share)).sum()
    expected = [after, after.sum() - seen.sum(), entropy]
    options = {"num_reads": slots.size}
    compare = {2: lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)}
    return Case(calls.record_reads, (seen, rows, counts), options, expected, compare=compare)


def _row_reads(draw, width, num_slots, numbers):
    """Reads as `update_rows` takes them, and the gradient of every row in float64."""
    tokens, reads, slices = draw.integer(1, 60), draw.integer(1, 12), draw.choice([1, 2])
    slices = slices if width % slices == 0 else 1
    expansion = draw.integer(1, 3)
    slots = draw.rng.integers(0, num_slots, (tokens, reads)).astype(np.int32)
    blocks = draw.rng.integers(0, expansion, (tokens, reads)).astype(np.int32)
    weights, wide = _computed(draw, numbers(draw, tokens, reads, slices))
    vectors = numbers(draw, tokens, expansion, width).astype(weights.dtype)
    of_reads = np.take_along_axis(vectors.astype(np.float64), blocks[..., None], axis=1)
    gradient = np.zeros((num_slots, width))
    np.add.at(gradient, slots, of_reads * np.repeat(wide, width // slices, axis=2))
    rows, _, order, row_of_read = reads_of(slots.reshape(-1), num_slots)
    return (rows, order, row_of_read, blocks, weights, vectors), gradient, np.unique(slots)


def update_rows(draw, rules=RULES, numbers_of_reads=_normal):
    width, num_slots = draw.choice([1, 2, 5, 8, 16, 24, 40]), draw.integer(1, 80)
    rule = draw.choice(rules)
    one_per_row = rule == "adagrad_row" or (rule.startswith("adamw") and draw.choice([False, True]))
    kernel = RowKernel(rule, 0.1, 0.9, 0.95, draw.choice([1e-8, 1e-2]), 0.7, one_per_row)
    reads, gradient, read = _row_reads(draw, width, num_slots, numbers_of_reads)
    arrays, numbers = [], []
    for per_row, integers in row_updates.arrays_of(kernel):
        stored, wide = _table(draw, num_slots, width)
        if integers:
            stored = draw.rng.integers(0, 5, (num_slots, 1)).astype(np.int32)
            wide = stored
        elif per_row:
            stored = np.abs(_normal(draw, num_slots, 1))
            wide = stored.astype(np.float64)
        elif arrays:  # sums of squares are not negative
            stored, wide = (
                (stored & 0x7FFF, np.abs(wide))
                if stored.dtype == np.uint16
                else (np.abs(stored), np.abs(wide))
            )
        arrays.append(stored)
        numbers.append(wide)
    step, rate, record = draw.integer(5, 9), 0.03, draw.choice([False, True])
    after = row_updates.after_step(kernel, [n[read] for n in numbers], gradient[read], step, rate)
    given = draw.integer(0, 3) == 0 and kernel.one_per_row
    rows = reads[0]
    means = np.zeros(len(rows), np.float32)
    means[: len(read)] = (gradient[read] ** 2).mean(1)

    def written(number):
        def compare(found, _):
            assert found.dtype == arrays[number].dtype
            untouched = np.setdiff1d(np.arange(num_slots), read)
            np.testing.assert_array_equal(found[untouched], arrays[number][untouched])
            wanted = after[number]
            if found.dtype == np.uint16:
                # Either neighbour of the exact number, which itself is known up to a few roundings.
                decoded = found[read].view(BFLOAT16).astype(np.float64)
                largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
                np.testing.assert_allclose(decoded, wanted, rtol=2.0**-7, atol=1e-3 * largest)
            elif found.dtype == np.int32:
                np.testing.assert_array_equal(found[read], wanted)
            else:
                np.testing.assert_allclose(found[read], wanted, rtol=5e-5, atol=5e-6)

        return compare

    def squares(found, _):
        np.testing.assert_allclose(found, (after[0] ** 2).sum(), rtol=1e-4)

    def before(number):
        def compare(found, _):
            np.testing.assert_array_equal(found[: len(read)], arrays[number][read])

        return compare

    count = len(arrays)
    compare = {i: written(i) for i in range(count)} | {count: squares}
    if record:
        compare |= {count + 1 + i: before(i) for i in range(count)}
    options = {
        "rule": kernel,
        "rate": np.float32(rate),
        "step": np.int32(step),
        "seed": np.uint32(7),
        "stochastic": draw.choice([False, True]),
        "record": record,
        "first": (draw.integer(0, 9), draw.integer(0, 9)),
        "means": means if given else None,
    }
    expected = [None] * (count + 1 + (count if record else 0))
    return Case(_update_rows, (arrays, reads), options, expected, compare=compare)


def _update_rows(arrays, reads, *, rule, **options):
    return calls.update_rows(rule, arrays, reads, **options)


def row_mean_squares(draw):
    width, num_slots = draw.choice([1, 3, 8, 24]), draw.integer(1, 80)
    reads, gradient, read = _row_reads(draw, width, num_slots, _normal)
    # Slots from some on may belong to other devices.
    own = draw.choice([num_slots, draw.integer(1, num_slots)])
    read = read[read < own]
    means = np.zeros(len(reads[0]))
    means[: len(read)] = (gradient[read] ** 2).mean(1)
    return Case(calls.row_mean_squares, (reads,), {"num_slots": own}, [means], 1e-5)


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


CASES = {
    case.__name__: case
    for case in (
        top_k,
        best_keys,
        key_scores,
        query_gradient,
        key_gradient,
        rms_norm,
        rms_norm_gradient,
        best_cells,
        best_cells_gradient,
        pool,
        products,
        rows_read,
        record_reads,
        update_rows,
        row_mean_squares,
        ngram_slots,
    )
}
"""Functions that draw a case, by the name of the kernel."""


def check(case, results):
    """Compares the results of a case, as arrays, with what is expected."""
    assert len(results) == len(case.expected)
    for number, (found, wanted) in enumerate(zip(results, case.expected, strict=True)):
        found = np.asarray(found)
        if number in case.compare:
            case.compare[number](found, wanted)
        elif case.tolerance:
            scale = max(np.abs(wanted).max(initial=0), 1e-6)
            np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=case.tolerance * scale)
        elif np.issubdtype(found.dtype, np.floating):
            np.testing.assert_array_equal(found.view(np.int32), np.asarray(wanted, np.float32).view(np.int32))
        else:
            np.testing.assert_array_equal(found, wanted)
