"""Times a decoding step of UltraMem beside dense, MoE and PKM models of equal compute and parameters.

A step takes one token of each sequence, with a full cache and random weights of the presets. There are two
studies: time against the number of sequences, and time against sparse parameters at one batch.

All models together do not fit into host memory, so they take turns: in every round each model is drawn, timed
at every batch, and deleted. The tables show beside each time the bytes that a step must touch, and the least
time that this machine needs for it. --redraw makes tables and figures again from the measurements of earlier
runs.

    python launch.py bench_decode --batches=1,64 --dtypes=float32 --ratios= --results=runs/bench_decode
"""

import logging
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from experiments.bench_decode import tables
from experiments.bench_decode.model import (
    Program,
    full_cache,
    part_programs,
    random_variables,
    served_in,
    sparse_over_dense,
    sparse_part,
    step_program,
    with_sparsity,
)
from experiments.bench_decode.records import DecodeRates, DecodeStudy, DecodeTiming
from experiments.common import machine
from ultramem_jax.accounting import bytes_per_token, count_parameters, decode_cost
from ultramem_jax.accounting.model import DTYPE_BYTES
from ultramem_jax.cli.arguments import positive_number
from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import choice, require, unknown
from ultramem_jax.models.cache import CACHE_DTYPES, cache_bytes
from ultramem_jax.presets import preset
from ultramem_jax.reporting.environment import describe_environment
from ultramem_jax.reporting.folders import make_folder
from ultramem_jax.tree_types import ArrayTree

MODELS = flags.DEFINE_list(
    "models",
    ["dense-151m", "moe-151m-2in32", "pkm-151m-x10", "ultramem-151m-x12"],
    "presets to time, each of another system",
)
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64", "256"], "numbers of sequences of a step")
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "dtypes of weights and tables")
CACHE_LENGTH = flags.DEFINE_integer(
    "cache_length", 128, "cache positions that a sequence attends to", lower_bound=1
)
CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype",
    "",
    "dtype of keys and values; empty: float32 on CPUs, where bfloat16 is slower, else that of the weights",
)
ROUNDS = flags.DEFINE_integer("rounds", 2, "turns of each model", lower_bound=1)
STEPS = flags.DEFINE_integer(
    "steps", 5, "steps of a turn that count, after as many that do not", lower_bound=1
)
RATIOS = flags.DEFINE_list(
    "ratios",
    ["2", "4", "8", "16", "32"],
    "sparse over dense parameters of the models of the second study; empty: without that study",
)
RATIO_BATCH = flags.DEFINE_integer(
    "ratio_batch", 64, "sequences of a step of the second study", lower_bound=1
)
RATIO_DTYPES = flags.DEFINE_list(
    "ratio_dtypes", ["float32", "bfloat16"], "dtypes of weights and tables in the second study"
)
RESULTS = flags.DEFINE_string("results", "experiments/results/bench_decode", "folder of tables and figures")
REDRAW = flags.DEFINE_bool(
    "redraw", False, "measure nothing; only make tables and figures from the .json files in --results"
)

T = TypeVar("T")

_SYSTEMS = {
    "dense": "dense",
    "moe": "moe",
    "olmoe": "moe",
    "pkm": "pkm",
    "memory-plus": "memory-plus",
    "engram": "engram",
    "ultramem-v2": "ultramem-v2",
    "ultramem": "ultramem",
    "peer": "peer",
}
"""Systems in tables and figures, by the beginning of a preset's name."""
_SHARE_OF_FREE = 0.8
"""Share of free host memory for weights and cache; compiling and the step's temporaries take the rest."""

log = logging.getLogger("ultramem_jax.bench_decode")  # the command line shows logs of this library


@dataclass
class Subject:
    """Holds a model that takes turns, and what was measured of it."""

    study: str
    preset: str
    config: ModelConfig
    batches: list[int]
    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Seconds of the steps that count, by batch."""
    parts: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    experts: dict[int, list[float]] = field(default_factory=dict)
    rows: dict[int, list[float]] = field(default_factory=dict)
    programs: dict[int, tuple[Program, dict[str, Program]]] = field(default_factory=dict)
    """The step and its parts by batch, compiled once for all turns."""

    @property
    def system(self) -> str:
        """Returns the name of the system in tables."""
        return _system(self.preset)

    @property
    def label(self) -> str:
        """Returns the text for the progress bar."""
        return f"{self.system} {self.config.dtype} {sparse_over_dense(self.config):.0f}x"


def main() -> None:
    """Times all models, and saves the measurements after every turn in a `.partial` file."""
    folder = make_folder(RESULTS.value, "results")
    files = sorted(folder.glob("*.json"))
    if REDRAW.value:
        require(bool(files), "results", RESULTS.value, "must hold a .json file of an earlier run")
        kept = [DecodeStudy.load(file) for file in files]
        for study in kept:
            _write(study, [other for other in kept if other is not study], folder)
        return
    environment = describe_environment()
    stem = tables.file_stem(DecodeStudy(environment, DecodeRates({}, 0.0), []))
    others = [DecodeStudy.load(file) for file in files if file.stem != stem]
    partial = folder / f"{stem}.partial"
    subjects = list(_subjects())
    require(
        bool(subjects), "models", ",".join(MODELS.value), "must have one that fits, at one batch at least"
    )
    dtypes = sorted({subject.config.dtype for subject in subjects}, reverse=True)
    rates: list[DecodeRates] = []
    turns = ROUNDS.value * sum(len(subject.batches) for subject in subjects)
    with tqdm(total=turns, desc="bench_decode", unit="batch", file=sys.stderr, dynamic_ncols=True) as bar:
        for _ in range(ROUNDS.value):
            for subject in subjects:
                bar.set_postfix_str(subject.label)
                # Measured at every turn: on a shared machine rates change while the models are timed.
                rates.append(_rates(dtypes))
                for _ in _turn(subject):
                    bar.update()
                timings = [timing for subject in subjects for timing in _timings(subject)]
                study = DecodeStudy(environment, DecodeRates.median(rates), timings)
                study.save(partial)
    _write(study, others, folder)
    partial.unlink()


def _rates(dtypes: Iterable[str]) -> DecodeRates:
    return DecodeRates(
        flops_per_second={dtype: machine.product_flops_per_second(dtype) for dtype in dtypes},
        bytes_per_second=machine.read_bytes_per_second(),
    )


def _write(study: DecodeStudy, others: list[DecodeStudy], folder: pathlib.Path) -> None:
    """Writes and prints the report, with measurements of other devices beside it."""
    written = tables.write(study, folder, others)
    print(f"\n{written[0].read_text()}\nwritten: {', '.join(map(str, written))}")


def _subjects() -> Iterator[Subject]:
    """Yields the models of both studies; models that do not fit are left out, and logged."""
    batches = sorted({positive_number("batches", text) for text in BATCHES.value})
    ratios = sorted({positive_number("ratios", text) for text in RATIOS.value if text})
    _check_dtypes("dtypes", DTYPES.value)
    _check_dtypes("ratio_dtypes", RATIO_DTYPES.value)
    systems = [_system(name) for name in MODELS.value]
    once = "must be of different systems, each once"
    require(len(set(systems)) == len(systems), "models", ",".join(MODELS.value), once)
    for dtype in DTYPES.value:
        for name in MODELS.value:
            yield from _fitting(Subject("batch", name, served_in(preset(name), dtype), batches))
    for dtype in RATIO_DTYPES.value if ratios else ():
        for name in MODELS.value:
            config = served_in(preset(name), dtype)
            sizes = [with_sparsity(config, ratio) for ratio in ratios] if config.moe or config.memory else []
            # For a tiny model two ratios can give the same sizes.
            for larger in dict.fromkeys(sizes):
                yield from _fitting(Subject("sparsity", name, larger, [RATIO_BATCH.value]))


def _check_dtypes(flag: str, dtypes: list[str]) -> None:
    for dtype in dtypes:
        choice(flag, dtype, tuple(DTYPE_BYTES))
    require(len(set(dtypes)) == len(dtypes), flag, ",".join(dtypes), "must name each once")


def _system(name: str) -> str:
    """Returns the name in tables of the system that a preset belongs to."""
    found = (system for begin, system in _SYSTEMS.items() if name.startswith(begin))
    system = next(found, None)
    if system is None:
        raise unknown("system of preset", name, _SYSTEMS)
    return system


def _fitting(subject: Subject) -> Iterator[Subject]:
    free = machine.available_bytes()
    # A step of 2^40 tokens reads every weight and every slot.
    weights = bytes_per_token(subject.config, 1 << 40, jnp.dtype(subject.config.dtype).itemsize).step
    for batch in list(subject.batches):
        cache = cache_bytes(subject.config, batch, CACHE_LENGTH.value, _cache_dtype(subject.config))
        if free is not None and weights + cache > _SHARE_OF_FREE * free:
            log.warning(
                "left out: %s at batch %d, %.1f GB of %.1f that are free",
                subject.label,
                batch,
                (weights + cache) / 1e9,
                free / 1e9,
            )
            subject.batches = [other for other in subject.batches if other != batch]
    if subject.batches:
        yield subject


def _turn(subject: Subject) -> Iterator[None]:
    """Times one round of one model: draws it, times it at each batch, and deletes it."""
    config = subject.config
    with machine.memory_of_their_own():
        variables = jax.block_until_ready(random_variables(config))
    for batch in subject.batches:
        if batch not in subject.programs:
            parts = part_programs(config)
            if subject.study == "sparsity":  # the study of batches times the other parts
                parts = {name: part for name, part in parts.items() if name == sparse_part(config)}
            subject.programs[batch] = step_program(config), parts
        step, parts = subject.programs[batch]
        kept, counters = full_cache(config, batch, CACHE_LENGTH.value, _cache_dtype(config))
        tokens = jnp.arange(batch, dtype=jnp.int32) * 37 % config.vocab_size
        seconds = subject.seconds.setdefault(batch, [])
        # The same tokens go through twice and choose the same experts. XLA makes the kernel of a product when
        # it first runs, so an expert that no token has chosen before takes several times as long.
        for counts in (False, True):
            following = tokens
            for _ in range(STEPS.value):
                elapsed, (kept, following, chosen) = _timed(step, variables, kept, counters, following)
                if counts:
                    seconds.append(elapsed)
                    subject.experts.setdefault(batch, []).append(float(chosen.experts))
                    subject.rows.setdefault(batch, []).append(chosen.distinct_rows())
        x = _embedded(config, batch)
        for name, part in parts.items():
            of_part = subject.parts.setdefault(batch, {}).setdefault(name, [])
            for number in range(1 + STEPS.value):
                elapsed, (kept, _) = _timed(part, variables, kept, counters, x)
                of_part += [elapsed] if number else []
        del kept
        yield


def _timed(program: Callable[..., T], *arguments: ArrayTree) -> tuple[float, T]:
    start = time.perf_counter()
    result = jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start, result


def _embedded(config: ModelConfig, batch: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, 1, config.embed_dim), jnp.dtype(config.dtype))


def _timings(subject: Subject) -> Iterator[DecodeTiming]:
    config = subject.config
    for batch, seconds in subject.seconds.items():
        parts = {name: statistics.median(times) for name, times in subject.parts.get(batch, {}).items()}
        yield DecodeTiming(
            study=subject.study,
            system=subject.system,
            preset=subject.preset,
            dtype=config.dtype,
            batch=batch,
            cache_length=CACHE_LENGTH.value,
            cache_dtype=_cache_dtype(config),
            sparse_over_dense=sparse_over_dense(config),
            parameters=count_parameters(config).total,
            seconds=tuple(seconds),
            parts=parts or None,
            cost=decode_cost(
                config,
                batch,
                CACHE_LENGTH.value,
                dtype=config.dtype,
                cache_dtype=_cache_dtype(config),
                experts=statistics.mean(subject.experts[batch]),
                rows=statistics.mean(subject.rows[batch]),
            ),
        )


def _cache_dtype(config: ModelConfig) -> str:
    if CACHE_DTYPE.value:
        choice("cache_dtype", CACHE_DTYPE.value, CACHE_DTYPES)
        return CACHE_DTYPE.value
    return "float32" if jax.default_backend() == "cpu" else config.dtype
