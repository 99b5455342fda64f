"""Times the candidates for every operation that has several algorithms, on the default device.

The fastest way of each operation is the one to choose in `ops.algorithms`. Shapes are those of 8,192 tokens
in models of 151 M parameters. Times are medians of single calls, so that they hold what it takes to start
them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.accelerator.timing import median_seconds
from ultramem_jax.layers.experts import (
    ExpertWeights,
    block_experts,
    dispatch_plan,
    grouped_experts,
    ragged_experts,
)
from ultramem_jax.ops.algorithms import choosing
from ultramem_jax.ops.cells_by_ranks import best_cells_by_ranks
from ultramem_jax.ops.key_products import candidates_by_products
from ultramem_jax.ops.key_scores import best_keys, key_scores
from ultramem_jax.ops.lookup import pooled_lookup
from ultramem_jax.ops.row_sums import sorted_rows, sums_of_rows
from ultramem_jax.ops.selection import largest
from ultramem_jax.ops.small_svd import small_svd
from ultramem_jax.ops.sorting import sort_with_order
from ultramem_jax.tree_types import ArrayTree


class Timing(NamedTuple):
    """Holds the time of one way of an operation."""

    operation: str
    way: str
    shape: str
    microseconds: float | None
    """Median of the calls; None where it failed."""
    gigabytes_per_second: float | None
    """Bytes that must be read and written, over the time: arguments and results, and of a table only the rows
    that are looked up."""
    error: str = ""


class _Candidate(NamedTuple):
    operation: str
    way: str
    shape: str
    function: Callable[..., ArrayTree]
    arguments: tuple[ArrayTree, ...]
    algorithms: dict[str, str] = {}  # noqa: RUF012
    unread: int = 0
    """Bytes of arguments that are not read."""


def probe(share: int = 1) -> Iterator[Timing]:
    """Yields the time of every candidate.

    Args:
        share: divides the number of tokens, rows and slots, and the inner width of experts, for a quick look
            on a CPU.
    """
    for candidates in (_device, _selection, _sums, _sorts, _candidates, _lookup, _experts, _svd):
        for candidate in candidates(share):
            yield _timed(candidate)


def _timed(candidate: _Candidate) -> Timing:
    named = candidate.operation, candidate.way, candidate.shape
    try:
        with choosing(**candidate.algorithms):
            compiled = jax.jit(candidate.function).lower(*candidate.arguments).compile()
        result = compiled(*candidate.arguments)
        median = median_seconds(lambda: compiled(*candidate.arguments))
    except Exception as error:  # a way that a device does not have is a result
        return Timing(*named, None, None, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")
    moved = sum(array.nbytes for array in jax.tree.leaves((candidate.arguments, result)))
    return Timing(*named, median * 1e6, (moved - candidate.unread) / median / 1e9)


def _normal(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


def _integers(most: int, *shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, most, jnp.int32)


def _device(share: int) -> Iterator[_Candidate]:
    values, side = (1 << 28) // share, 8192 // share
    yield _Candidate("copy", "add one", f"{4 * values / 1e9:.2g} GB", lambda x: x + 1, (_normal(values),))
    square = _normal(side, side, dtype="bfloat16")
    yield _Candidate("product", "bfloat16", f"{side}³", lambda a: a @ a, (square,))


def _by_maxima(x: jax.Array, k: int) -> jax.Array:
    """Returns the positions of the k largest of every row, one after the other."""

    def body(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, found = carry
        best = jnp.argmax(x, -1)
        taken = jnp.arange(x.shape[1])[None] == best[:, None]
        return jnp.where(taken, -jnp.inf, x), found.at[:, number].set(best.astype(jnp.int32))

    return jax.lax.fori_loop(0, k, body, (x, jnp.zeros((x.shape[0], k), jnp.int32)))[1]


def _selection(share: int) -> Iterator[_Candidate]:
    for rows, width, k in ((32768, 2200, 42), (16384, 1764, 42), (8192, 640, 16), (16384, 32, 2)):
        rows //= share
        x, shape = _normal(rows, width), f"{rows} rows of {width}, k {k}"
        yield _Candidate("selection", "lax.top_k", shape, partial(jax.lax.top_k, k=k), (x,))
        for picks in ("gather", "compare"):
            of_columns = partial(largest, k=k)
            ways = {"picks": picks}
            yield _Candidate("selection", f"ranks, {picks}", shape, of_columns, (x.T,), ways)
        yield _Candidate("selection", "maxima in turn", shape, partial(_by_maxima, k=k), (x,))
        approximate = partial(jax.lax.approx_max_k, k=k)
        yield _Candidate("selection", "approx_max_k (not exact)", shape, approximate, (x,))


def _sums(share: int) -> Iterator[_Candidate]:
    def summed(rows: jax.Array, values: jax.Array, num_rows: int) -> jax.Array:
        found = sorted_rows(rows, num_rows)
        return sums_of_rows(values[found.order], found.row_of_read, found.counts)

    def scattered(rows: jax.Array, values: jax.Array, num_rows: int) -> jax.Array:
        return jnp.zeros((num_rows, values.shape[1]), values.dtype).at[rows].add(values)

    for count, width, num_rows in ((688_128, 512, 1_210_000), (262_144, 128, 1 << 20), (8192, 1024, 50_432)):
        count, num_rows = count // share, max(num_rows // share, 128)
        arguments = _integers(num_rows, count), _normal(count, width)
        shape = f"{count} reads of {num_rows} rows of {width}"
        for way in ("products", "scatter"):
            ways = {"sums_by_row": way, "sort": "pairs"}
            of_rows = partial(summed, num_rows=num_rows)
            yield _Candidate("sums by row", f"sorted, {way}", shape, of_rows, arguments, ways)
        dense = partial(scattered, num_rows=num_rows)
        yield _Candidate("sums by row", "scatter-add, any order", shape, dense, arguments)
    count = 8192 // share
    ids, values = _integers(257, count), _normal(count, 1024, dtype="bfloat16")
    shape = f"{count} tokens of 257 ids, 1024 wide"
    yield _Candidate("few rows", "scatter-add", shape, partial(scattered, num_rows=257), (ids, values))
    one_hot = lambda ids, values: jax.nn.one_hot(ids, 257, dtype=values.dtype).T @ values  # noqa: E731
    yield _Candidate("few rows", "one-hot product", shape, one_hot, (ids, values))


def _sorts(share: int) -> Iterator[_Candidate]:
    count, num_rows = 688_128 // share, 1_210_000
    keys, shape = _integers(num_rows, count), f"{count} slots"
    for way in ("words", "pairs"):
        of_keys = partial(sort_with_order, num_values=num_rows)
        yield _Candidate("sort with order", way, shape, of_keys, (keys,), {"sort": way})


def _candidates(share: int) -> Iterator[_Candidate]:
    tokens, heads, ranks, num_keys, width, m = 8192 // share, 2, 2, 2200, 250, 42
    queries = _normal(tokens, 2, heads, ranks, width, dtype="bfloat16")
    keys = _normal(2, heads, ranks, num_keys, width, seed=1, dtype="bfloat16")
    directions = jnp.full((2, heads, ranks), 0.7, jnp.float32)
    shape = f"{tokens} tokens, K {num_keys}, m {m}"

    def by_rows(queries: jax.Array, keys: jax.Array, directions: jax.Array) -> jax.Array:
        index = best_keys(queries, keys, directions, m)
        return key_scores(queries, keys, index).sum()

    def by_products(queries: jax.Array, keys: jax.Array, directions: jax.Array) -> jax.Array:
        return candidates_by_products(queries, keys, directions, m)[1].sum()

    operation, arguments = "candidates and keys' gradient", (queries, keys, directions)
    yield _Candidate(operation, "rows", shape, jax.value_and_grad(by_rows, (0, 1)), arguments)
    for picks in ("gather", "compare"):
        gradients = jax.value_and_grad(by_products, (0, 1))
        yield _Candidate(operation, f"products, {picks}", shape, gradients, arguments, {"picks": picks})
    scores = _normal(tokens, 2, heads, ranks, m)
    cores = jax.random.uniform(jax.random.key(2), (heads, 2, ranks, ranks))
    for picks in ("gather", "compare"):
        cells = partial(best_cells_by_ranks, top_m=m)  # JAX traces each function only once
        yield _Candidate("best cells", picks, shape, cells, (scores, cores), {"picks": picks})


def _lookup(share: int) -> Iterator[_Candidate]:
    tokens, reads, expansion, width, slots = 8192 // share, 84, 4, 512, 1_210_000 // share
    table, at = _normal(slots, width), _integers(slots, tokens, reads)
    blocks = _integers(expansion, tokens, reads, seed=1)
    weights = _normal(tokens, reads, 2, seed=2, dtype="bfloat16")
    shape = f"{tokens} × {reads} rows of {width} among {slots}"
    gather = lambda table, at: table.at[at].get(mode="promise_in_bounds").astype(jnp.bfloat16)  # noqa: E731
    # Below 0 if rows are read more than once.
    unread = table.nbytes - at.size * width * table.dtype.itemsize
    yield _Candidate("lookup", "only gather", shape, gather, (table, at), unread=unread)
    pooled = partial(pooled_lookup, expansion=expansion)
    arguments = table, at, blocks, weights
    yield _Candidate("lookup", "gather and pool", shape, pooled, arguments, unread=unread)


def _experts(share: int) -> Iterator[_Candidate]:
    tokens, num_experts, k, width, inner = 8192 // share, 32, 2, 1024, max(2528 // share, 128)
    x = _normal(tokens, width, dtype="bfloat16")
    weights = ExpertWeights(
        _normal(num_experts, width, inner) / 32, _normal(num_experts, inner, width) / 50, None
    )
    gates, experts = jnp.full((tokens, k), 0.5), _integers(num_experts, tokens, k)
    shape = f"{tokens} tokens, {k} of {num_experts}, {width} × {inner}"

    def loss(
        x: jax.Array,
        weights: ExpertWeights,
        gates: jax.Array,
        experts: jax.Array,
        way: Callable[..., jax.Array],
    ) -> jax.Array:
        return way(x, gates, weights, dispatch_plan(experts, num_experts)).sum()

    # The choice of experts is an argument, or a compiler would sort tokens by expert itself.
    arguments = x, weights, gates, experts
    for name, way in (("ragged", ragged_experts), ("groups", grouped_experts), ("blocks", block_experts)):
        gradients = jax.grad(partial(loss, way=way), (0, 1))
        yield _Candidate("experts, with gradients", name, shape, gradients, arguments)


def _svd(share: int) -> Iterator[_Candidate]:
    del share
    for rows in (2, 4):
        cores, shape = _normal(8, rows, rows), f"8 cores of {rows} × {rows}"
        for way in ("library", "small"):
            yield _Candidate(
                "decomposition", way, shape, lambda c: tuple(small_svd(c)), (cores,), {"svd": way}
            )
