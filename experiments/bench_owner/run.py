"""Times the work of one of P owners of a table in a lookup, forward and backward, on this machine.

A group of P devices has P times the tokens of one device, and each owner sees the reads of the whole group.
By slots, an owner works on the reads of its N/P rows, which it has to find among all. By width, it works on
its d_v/P columns for all reads. If the work were divided evenly and there were no other work, the times would
not depend on P.

For P = 1 (no mesh), 2, 4, ..., the experiment times the pooled sums, and the products that are the gradient
of the scores. Devices send nothing here; for communication see `plan`.

    python launch.py bench_owner --parts=1,2,4 --out=runs/bench_owner
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from experiments.common import report
from ultramem_jax.cli.arguments import positive_number
from ultramem_jax.errors import require
from ultramem_jax.ops.lookup import pooled_lookup, score_products
from ultramem_jax.ops.owned_rows import pooled_of_owned, products_of_owned
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.environment import describe_environment

PARTS = flags.DEFINE_list("parts", ["1", "2", "4", "8", "16", "32", "64"], "numbers of owners P to time")
TOKENS = flags.DEFINE_integer("tokens", 512, "tokens of each device", lower_bound=1)
SLOTS = flags.DEFINE_integer("slots", 1 << 20, "rows of the whole table", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 11, "rounds that count, after one round of warm-up", lower_bound=1)
OUT = flags.DEFINE_string(
    "out", "experiments/results/bench_owner/bench_owner", "path of the table, without suffix"
)

READS, WIDTH, BLOCKS, CORES = 64, 64, 4, 2
"""R, d_v, E and h of the memory that is timed."""


def main() -> None:
    """Times all numbers of owners in turns, and prints and writes the table."""
    parts = [_parts(text) for text in PARTS.value]
    environment = describe_environment()
    steps = {p: _operations(p) for p in parts}
    seconds: dict[tuple[int, str], list[float]] = {}
    for number in tqdm(range(REPEATS.value + 1), desc="bench_owner", unit="round", file=sys.stderr):
        for p, (operations, draw) in steps.items():
            drawn = jax.block_until_ready(draw(jax.random.key(number)))
            # A first pass puts pages and caches into the same state for every operation that is timed.
            for operation in operations.values():
                jax.block_until_ready(operation(drawn))
            for name, operation in operations.items():
                start = time.perf_counter()
                jax.block_until_ready(operation(drawn))
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
            "`backward` the products that are the gradient of the scores."
        ],
    )
    print(f"\n{written[0].read_text()}")


def _parts(text: str) -> int:
    number = positive_number("parts", text)
    for name, size in (("slots", SLOTS.value), ("width", WIDTH)):
        require(size % number == 0, "parts", number, f"must divide the {name} of the table, {size}")
    return number


class Inputs(NamedTuple):
    """Holds the inputs of an owner's operations; T are the tokens of the whole group."""

    rows: jax.Array
    """(N/P, d_v) float32: the rows of an owner by slots."""
    columns: jax.Array
    """(N, d_v/P) float32: the columns of an owner by width."""
    slots: jax.Array
    """(T, R) int32 in [0, N): the slots that are read."""
    blocks: jax.Array
    """(T, R) int32 in [0, E): the virtual blocks of the reads."""
    scores: jax.Array
    """(T, R, h) float32: the scores of the reads."""
    vectors: jax.Array
    """(T, E, d_v) float32: the cotangents of the pooled sums."""


Operation: TypeAlias = Callable[[Inputs], jax.Array]
"""A compiled operation of an owner."""


def _operations(p: int) -> tuple[dict[str, Operation], Callable[[jax.Array], Inputs]]:
    """Returns the compiled operations of an owner by name, and the function that draws their inputs."""
    tokens, rows, columns = p * TOKENS.value, SLOTS.value // p, WIDTH // p
    cores = max(CORES // p, 1)

    def draw(key: jax.Array) -> Inputs:
        keys = jax.random.split(key, 6)
        return Inputs(
            jax.random.normal(keys[0], (rows, WIDTH), jnp.float32),
            jax.random.normal(keys[1], (SLOTS.value, columns), jnp.float32),
            jax.random.randint(keys[2], (tokens, READS), 0, SLOTS.value, jnp.int32),
            jax.random.randint(keys[3], (tokens, READS), 0, BLOCKS, jnp.int32),
            jax.random.normal(keys[4], (tokens, READS, CORES), jnp.float32),
            jax.random.normal(keys[5], (tokens, BLOCKS, WIDTH), jnp.float32),
        )

    operations: dict[str, Operation] = {
        "slots forward": jax.jit(
            lambda x: pooled_of_owned(x.rows, x.slots, x.blocks, x.scores, jnp.int32(0), BLOCKS)
        ),
        "slots backward": jax.jit(
            lambda x: products_of_owned(x.rows, x.slots, x.blocks, x.vectors, jnp.int32(0), CORES)
        ),
        "width forward": jax.jit(
            lambda x: pooled_lookup(x.columns, x.slots, x.blocks, x.scores[..., :cores], BLOCKS)
        ),
        "width backward": jax.jit(
            lambda x: score_products(x.columns, x.slots, x.blocks, x.vectors[..., :columns], cores)
        ),
    }
    return operations, jax.jit(draw)


def _row(p: int, seconds: dict[str, list[float]]) -> markdown.Row:
    ms = {name: [1e3 * s for s in values] for name, values in seconds.items()}
    row: markdown.Row = {"P": p, "reads of the group": p * TOKENS.value * READS}
    for name, values in ms.items():
        row[name] = statistics.median(values)
        if len(values) > 1:
            first, _, third = statistics.quantiles(values, n=4)
            row[f"± {name}"] = (third - first) / 2
    row["slots, all"] = math.fsum(statistics.median(ms[n]) for n in ("slots forward", "slots backward"))
    row["width, all"] = math.fsum(statistics.median(ms[n]) for n in ("width forward", "width backward"))
    return row
