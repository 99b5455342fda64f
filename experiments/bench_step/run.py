"""Times a training step against the slots of its memory, row-sparse beside dense, with its floor.

By default one memory layer is timed without a model (512 tokens, D 256, 2·32 reads of 128 values): forward,
backward and AdamW. Ways take turns: row-sparse with native kernels, row-sparse by XLA, dense, and the first
two with table and moments in bfloat16. With --authors=PATH the layer of the authors' PyTorch code takes
turns, too. Ways that do not fit into host memory are left out, and the table says so. Where FBGEMM is
installed, the lookup and its update are timed beside it.

The table shows beside each time the least time that this machine needs, from the FLOPs and bytes of the step
(ultramem_jax/accounting/step_costs.py) and measured rates. It also shows the parts of the step, each timed
separately. --model times a small language model with that layer, without the parts. --redraw makes tables and
figures again from the measurements of earlier runs.

    python launch.py bench_step --slots=65536,1048576 --results=runs/bench_step
"""

import math
import pathlib
import sys

from absl import flags
from tqdm import tqdm

from experiments.bench_step import lookups, study, tables
from experiments.bench_step.authors import AuthorsLayer
from experiments.bench_step.memory_step import SEQUENCES, Way, bench_memory
from experiments.bench_step.records import Study
from experiments.common import machine
from experiments.common.timing import WARM_UP
from ultramem_jax.errors import UserError, at_least, require, whole_number
from ultramem_jax.reporting.environment import describe_environment
from ultramem_jax.reporting.folders import make_folder

SLOTS = flags.DEFINE_list(
    "slots",
    ["65536", "1048576", "4194304", "16777216", "20250000"],
    "comma-separated numbers of slots of the tables; each must be a square",
)
TOKENS = flags.DEFINE_integer("tokens", 512, "tokens of a step, in two sequences", lower_bound=4)
REPEATS = flags.DEFINE_integer(
    "repeats", 15, f"steps that count, after {WARM_UP} steps of warm-up", lower_bound=1
)
LAYER = flags.DEFINE_bool("layer", True, "time the layer without a model")
MODEL = flags.DEFINE_bool("model", False, "also time a small language model with that memory")
MEMORY = flags.DEFINE_float(
    "memory_gb", None, "host memory to stay within, in GB (10^9 bytes); by default 90 % of what is free"
)
RESULTS = flags.DEFINE_string("results", "experiments/results/bench_step", "folder of tables and figures")
AUTHORS = flags.DEFINE_string(
    "authors",
    None,
    "checkout of the authors' code (ZihaoHuang-notabot/Ultra-Sparse-Memory-Network), whose layer is timed "
    "too; needs PyTorch",
)
REDRAW = flags.DEFINE_bool(
    "redraw", False, "measure nothing; only make tables and figures from the .json files in --results"
)

_SHARE_OF_FREE = 0.9
_SMALL_SIDE = 32
_SUBJECTS = {
    False: ("bench_step", "Training step of one memory layer", "One layer of width D 256"),
    True: (
        "bench_step_model",
        "Training step of a small language model with one memory",
        "4 layers, D 256, MLP 1024, bytes; the memory reads in layer 2 and lands after layer 3",
    ),
}
"""Name of the files, title and description; the key tells whether the whole model is timed."""


def main() -> None:
    """Times all sizes and ways, and writes tables and figures."""
    if REDRAW.value:
        _redraw(pathlib.Path(RESULTS.value))
        return
    sides = _sides(SLOTS.value)
    tokens, repeats = TOKENS.value, REPEATS.value
    require(tokens % SEQUENCES == 0, "tokens", tokens, f"must be a multiple of {SEQUENCES}, the sequences")
    require(LAYER.value or MODEL.value, "layer", False, "must be True unless --model is given")
    limit = _memory_limit()
    # Described at the start: the code that runs is the code that was checked out at that time.
    environment = describe_environment()
    subjects = [model for model, wanted in ((False, LAYER.value), (True, MODEL.value)) if wanted]
    if AUTHORS.value is not None:
        # Refuses what is no checkout before anything runs.
        AuthorsLayer(AUTHORS.value, _SMALL_SIDE, 2 * SEQUENCES)
    plans = {
        model: [study.plan(side, tokens, limit, model=model, authors=AUTHORS.value) for side in sides]
        for model in subjects
    }
    if limit is not None and not any(size.groups for sizes in plans.values() for size in sizes):
        raise UserError(f"memory_gb = {limit / 1e9:.3g}: no step fits, of any of these sizes")
    folder = make_folder(RESULTS.value, "results")
    rates = machine.measure_rates()
    for model, sizes in plans.items():
        name, title, about = _SUBJECTS[model]
        measured = Study(
            name=name,
            title=title,
            about=about,
            memory=bench_memory(sides[0], Way()),
            tokens=tokens,
            repeats=repeats,
            memory_limit=limit,
            rates=rates,
            environment=environment,
            steps=[],
            parts=[],
            lookups=[],
        )
        memory = measured.memory
        shape = tokens, memory.reads_per_token, memory.table.value_dim
        beside = [] if model else [size for size in sizes if lookups.can_run(size.num_keys**2, *shape, limit)]
        rounds = (WARM_UP + repeats) * (sum(size.rounds for size in sizes) + lookups.WAYS * len(beside))
        with tqdm(total=rounds, desc=name, unit="step", file=sys.stderr, dynamic_ncols=True) as bar:
            for size in sizes:
                bar.set_postfix_str(f"{size.num_keys**2:,} slots")
                steps, parts = study.measure(size, tokens, repeats, bar.update)
                measured.steps.extend(steps)
                measured.parts.extend(parts)
                if size in beside:
                    found = lookups.measure(size.num_keys**2, *shape, repeats, bar.update)
                    measured.lookups.extend(found)
                # Written after every size, so that an interrupted run keeps its measurements.
                written = tables.write(measured, folder)
        print(f"\n{written[0].read_text()}\nwritten: {', '.join(map(str, written))}")


def _redraw(folder: pathlib.Path) -> None:
    """Writes tables and figures of the studies in a folder, whose files stay as they are."""
    files = sorted(folder.glob("*.json"))
    require(bool(files), "results", RESULTS.value, "must hold a .json file of an earlier run")
    for kept in [Study.load(file) for file in files]:
        written = tables.draw(kept, folder)
        print(f"\n{written[0].read_text()}\nwritten: {', '.join(map(str, written))}")


def _sides(slots: list[str]) -> list[int]:
    """Returns the keys per side n of tables of n² slots, in rising order."""
    require(bool(slots), "slots", ",".join(slots), "must name at least one size")
    sides = set()
    for text in slots:
        number = whole_number(text) or 0
        side = math.isqrt(number)
        require(number > 0 and side**2 == number, "slots", text, "must be a square: 65536, 1048576, ...")
        sides.add(side)
    return sorted(sides)


def _memory_limit() -> int | None:
    """Returns the bytes that steps must fit into; None if the free host memory is unknown."""
    free = machine.available_bytes()
    if MEMORY.value is None:
        return None if free is None else int(_SHARE_OF_FREE * free)
    at_least(0, memory_gb=MEMORY.value)
    limit = int(MEMORY.value * 1e9)
    if free is not None:
        require(limit <= free, "memory_gb", MEMORY.value, f"must be at most what is free, {free / 1e9:.1f}")
    return limit
