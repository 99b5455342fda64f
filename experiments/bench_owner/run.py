"""What one of P owners of a table does with it, forward and backward, timed on this machine alone.

A group of P devices has P times the tokens of one, and each owner sees the reads of all. By slots it lists
those that fall to its N/P rows and works on them; by width it works on its d_v/P columns of all of them. If
the work were shared out evenly and nothing else were to be done, a line of the table would not depend on P.
Timed are, for P = 1 (no mesh), 2, 4, ...: the list of owned reads, the pooled sums, and the products that are
the gradient of the scores. No device sends anything here: for that see `plan`.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from experiments.common import report
from ultramem_jax.errors import require, whole_number
from ultramem_jax.ops.lookup import pooled_lookup, score_products
from ultramem_jax.ops.owned_rows import owned_reads, pool_owned, score_products_owned
from ultramem_jax.reporting.environment import describe_environment

PARTS = flags.DEFINE_list("parts", ["1", "2", "4", "8", "16", "32", "64"], "numbers of owners P")
TOKENS = flags.DEFINE_integer("tokens", 512, "tokens of each device", lower_bound=1)
SLOTS = flags.DEFINE_integer("slots", 1 << 20, "rows of the whole table", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 11, "rounds that count, after one of warm-up", lower_bound=1)
OUT = flags.DEFINE_string("out", "experiments/results/bench_owner/bench_owner", "table, without its suffix")

READS, WIDTH, BLOCKS, CORES = 64, 64, 4, 2
"""R, d_v, E, h."""


def main() -> None:
    """Times all numbers of owners in turns; prints and writes the table."""
    parts = [_parts(text) for text in PARTS.value]
    environment = describe_environment()
    steps = {p: _operations(p) for p in parts}
    seconds: dict[tuple[int, str], list[float]] = {}
    for number in tqdm(range(REPEATS.value + 1), desc="bench_owner", unit="round", file=sys.stderr):
        for p, (operations, draw) in steps.items():
            drawn = jax.block_until_ready(draw(jax.random.key(number)))
            for operation in operations.values():  # whose pages and caches are then as for those behind it
                jax.block_until_ready(operation(*drawn))
            for name, operation in operations.items():
                start = time.perf_counter()
                jax.block_until_ready(operation(*drawn))
                if number:
                    seconds.setdefault((p, name), []).append(time.perf_counter() - start)
    written = report.write_table(
        [_row(p, {name: seconds[q, name] for q, name in seconds if q == p}) for p in parts],
        OUT.value,
        "What one of P owners does in a lookup, ms",
        environment,
        [
            f"{TOKENS.value} tokens of each device, so P times as many of a group; {SLOTS.value:,} slots of "
            f"{WIDTH} float32 values in all; R {READS}, E {BLOCKS}, h {CORES}. Medians of {REPEATS.value} "
            "rounds, all P in turns; ± is half the distance between quartiles. `forward` is the pooled sums, "
            "`backward` the products that are the gradient of the scores; by slots both are for reads that "
            "are listed already, which `list` does once for the two."
        ],
    )
    print(f"\n{written[0].read_text()}")


def _parts(text: str) -> int:
    number = whole_number(text) or 0
    require(number > 0, "parts", text, "must be whole numbers above 0")
    for name, size in (("slots", SLOTS.value), ("width", WIDTH)):
        require(size % number == 0, "parts", number, f"must divide the {name} of the table, {size}")
    return number


def _operations(p: int) -> tuple[dict[str, Callable[..., Any]], Callable[..., Any]]:
    """What an owner does, compiled, and what draws its arguments."""
    tokens, rows, columns = p * TOKENS.value, SLOTS.value // p, WIDTH // p
    cores = max(CORES // p, 1)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, 6)
        return (
            jax.random.normal(keys[0], (rows, WIDTH), jnp.float32),
            jax.random.normal(keys[1], (SLOTS.value, columns), jnp.float32),
            jax.random.randint(keys[2], (tokens, READS), 0, SLOTS.value, jnp.int32),
            jax.random.randint(keys[3], (tokens, READS), 0, BLOCKS, jnp.int32),
            jax.random.normal(keys[4], (tokens, READS, CORES), jnp.float32),
            jax.random.normal(keys[5], (tokens, BLOCKS, WIDTH), jnp.float32),
        )

    def by_slots(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(table: Any, narrow: Any, slots: Any, blocks: Any, scores: Any, vectors: Any) -> jax.Array:
            owned = owned_reads(slots, jnp.int32(0), rows)
            return function(table, owned, blocks, scores, vectors)

        return jax.jit(run)

    operations: dict[str, Callable[..., Any]] = {
        "list": by_slots(lambda table, owned, *rest: owned.places),
        "slots forward": by_slots(lambda t, o, blocks, s, v: pool_owned(t, o, blocks, s, BLOCKS)),
        "slots backward": by_slots(lambda t, o, blocks, s, v: score_products_owned(t, o, blocks, v, CORES)),
        "width forward": jax.jit(
            lambda t, n, slots, blocks, s, v: pooled_lookup(n, slots, blocks, s[..., :cores], BLOCKS)
        ),
        "width backward": jax.jit(
            lambda t, n, slots, blocks, s, v: score_products(n, slots, blocks, v[..., :columns], cores)
        ),
    }
    return operations, jax.jit(draw)


def _row(p: int, seconds: dict[str, list[float]]) -> dict[str, object]:
    ms = {name: [1e3 * s for s in values] for name, values in seconds.items()}
    # Both ways by slots make the list first; what is left is their own.
    for name in ("slots forward", "slots backward"):
        ms[name] = [whole - listed for whole, listed in zip(ms[name], ms["list"], strict=True)]
    row: dict[str, object] = {"P": p, "reads of the group": p * TOKENS.value * READS}
    for name, values in ms.items():
        row[name] = statistics.median(values)
        if len(values) > 1:
            first, _, third = statistics.quantiles(values, n=4)
            row[f"± {name}"] = (third - first) / 2
    row["slots, all"] = sum(statistics.median(ms[n]) for n in ("list", "slots forward", "slots backward"))
    row["width, all"] = sum(statistics.median(ms[n]) for n in ("width forward", "width backward"))
    return row
