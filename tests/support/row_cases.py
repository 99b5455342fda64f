"""Cases of kernels that look up, list and update the rows of tables."""

import numpy as np

from tests.support import row_updates
from tests.support.kernel_case import BFLOAT16, Case, computed, normal, tolerance
from ultramem_jax.kernels import calls
from ultramem_jax.kernels.rules import RULES, RowKernel


def _table(draw, rows, width):
    """A table as it is stored, and its numbers."""
    numbers = normal(draw, rows, width)
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
    scores, wide = computed(draw, normal(draw, *slots.shape, slices))
    weighed = read * np.repeat(wide, table.shape[1] // slices, axis=2)
    pooled = np.einsum("tje,tjd->ted", blocks[..., None] == np.arange(expansion), weighed)
    arrays = (table, slots, blocks, scores)
    return Case(calls.pool, arrays, {"expansion": expansion} | options, [pooled], tolerance(scores))


def products(draw):
    table, slots, blocks, read, expansion, slices, options = _lookup(draw)
    vectors, wide = computed(draw, normal(draw, len(slots), expansion, table.shape[1]))
    of_reads = np.take_along_axis(wide, blocks[..., None], axis=1)
    found = (read * of_reads).reshape(*slots.shape, slices, -1).sum(-1)
    arrays = (table, slots, blocks, vectors)
    return Case(calls.products, arrays, {"cores": slices} | options, [found], tolerance(vectors))


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
    weights, wide = computed(draw, numbers(draw, tokens, reads, slices))
    vectors = numbers(draw, tokens, expansion, width).astype(weights.dtype)
    of_reads = np.take_along_axis(vectors.astype(np.float64), blocks[..., None], axis=1)
    gradient = np.zeros((num_slots, width))
    np.add.at(gradient, slots, of_reads * np.repeat(wide, width // slices, axis=2))
    rows, _, order, row_of_read = reads_of(slots.reshape(-1), num_slots)
    return (rows, order, row_of_read, blocks, weights, vectors), gradient, np.unique(slots)


def update_rows(draw, rules=RULES, numbers_of_reads=normal):
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
            stored = np.abs(normal(draw, num_slots, 1))
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
    reads, gradient, read = _row_reads(draw, width, num_slots, normal)
    # Slots from some on may belong to other devices.
    own = draw.choice([num_slots, draw.integer(1, num_slots)])
    read = read[read < own]
    means = np.zeros(len(reads[0]))
    means[: len(read)] = (gradient[read] ** 2).mean(1)
    return Case(calls.row_mean_squares, (reads,), {"num_slots": own}, [means], 1e-5)
