"""Times training steps of whole models at equal compute, in turns: UltraMem and its baselines.

The base is a model with UltraMem memories, that of --config=demo by default.
`ultramem_jax.baselines.matching` builds the other systems with the same FLOPs per token and the same sparse
parameters, within 2 %. A system with memories is timed with native kernels and, as `… by XLA`, without them.
Batches are random ids: what a step takes does not depend on the text.

    python launch.py bench_train --systems=ultramem,dense --repeats=5 --out=runs/bench_train
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import NamedTuple

from absl import flags
from tqdm import tqdm

from experiments.common import machine, report
from experiments.common.model_steps import draw_tokens, model_contender
from experiments.common.timing import WARM_UP, Timing, needed, race, spread, times_as_fast
from ultramem_jax import ModelConfig, RunConfig
from ultramem_jax.accounting import flops_per_token
from ultramem_jax.baselines.matching import SYSTEMS, match, verify_match
from ultramem_jax.cli import command_line
from ultramem_jax.cli.arguments import check_names
from ultramem_jax.errors import UserError
from ultramem_jax.recipes import demo
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.environment import describe_environment

BASE_CONFIG = demo.get_config()

SYSTEM_NAMES = flags.DEFINE_list(
    "systems", ["ultramem", "dense", "moe"], "systems to time, of " + ", ".join(SYSTEMS)
)
REPEATS = flags.DEFINE_integer(
    "repeats", 15, f"steps that count, after {WARM_UP} steps of warm-up", lower_bound=1
)
OUT = flags.DEFINE_string(
    "out", "experiments/results/bench_train/bench_train", "path of the table, without suffix"
)

_BY_XLA = " by XLA"


class _Way(NamedTuple):
    """Describes a system as it is timed."""

    config: RunConfig
    kernels: bool


def main() -> None:
    """Times all systems, and prints and writes the table."""
    base = command_line.run_config()
    check_names("systems", SYSTEM_NAMES.value, SYSTEMS)
    environment = describe_environment()
    models = {system: match(base.model, system) for system in SYSTEM_NAMES.value}
    verify_match({"base": base.model, **models})
    ways = _ways(base, models)
    contenders = {name: model_contender(way.config, kernels=way.kernels) for name, way in ways.items()}
    need, free = needed([contender.need for contender in contenders.values()]), machine.available_bytes()
    if free is not None and need > free:
        raise UserError(
            f"systems = {','.join(models)}: need {need / 1e9:.1f} GB of host memory together, "
            f"{free / 1e9:.1f} GB are free"
        )
    rounds = (WARM_UP + REPEATS.value) * len(ways)
    with tqdm(total=rounds, desc="bench_train", unit="step", file=sys.stderr, dynamic_ncols=True) as bar:
        timings, _ = race(contenders, draw_tokens(base), REPEATS.value, bar.update)
    tokens = base.train.batch_size * base.data.seq_len
    written = report.write_table(
        _rows(timings, models, tokens),
        OUT.value,
        "Training steps at equal compute",
        environment,
        [
            f"{base.train.batch_size} × {base.data.seq_len} tokens a step; forward, backward and update. All "
            f"systems in turns on the same batches, medians of {REPEATS.value} rounds; ratios are medians of "
            "the ratios of a round. FLOPs per token: forward, without attention scores and logits, which are "
            "equal for all.",
        ],
    )
    print(f"\n{written[0].read_text()}")


def _ways(base: RunConfig, models: Mapping[str, ModelConfig]) -> dict[str, _Way]:
    """Returns what to time, by name."""
    ways = {}
    for system, model in models.items():
        config = dataclasses.replace(base, model=model)
        ways[system] = _Way(config, kernels=True)
        if model.memories:
            ways[system + _BY_XLA] = _Way(config, kernels=False)
    return ways


def _rows(
    timings: Mapping[str, Timing], models: Mapping[str, ModelConfig], tokens: int
) -> list[markdown.Row]:
    def beside(name: str, other: str) -> float | None:
        if other not in timings or other == name:
            return None
        return times_as_fast(timings[name].ms, timings[other].ms)

    rows: list[markdown.Row] = []
    for name, timing in timings.items():
        median, low, high = spread(timing.ms)
        model = models[name.removesuffix(_BY_XLA)]
        rows.append(
            {
                "system": name,
                "FLOPs per token": flops_per_token(model).matched,
                "ms": median,
                "p10–p90": f"{low:.1f}–{high:.1f}",
                "tokens/s": round(1e3 * tokens / median),
                "times as fast as dense": beside(name, "dense"),
                "times as fast as by XLA": beside(name, name + _BY_XLA),
            }
        )
    return rows
