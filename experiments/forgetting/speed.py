"""Times a training step that changes only selected rows beside one that changes all rows that it read."""

import statistics
from collections.abc import Callable

from experiments.common.model_steps import draw_tokens, model_contender
from experiments.common.timing import race
from experiments.forgetting.records import Speed
from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.presets import families

SIDES = (256, 1024, 2048)
"""Square roots of the slots of the tables. Three steps of the largest hold 10 GB."""
TOKENS = (4, 512)
"""Sequences of a batch, and their tokens."""
SELECTED = 512
"""Rows that a step may change, where it selects."""


def _run(side: int, **selection: object) -> RunConfig:
    """Returns the run of a small language model with one memory of `side`² slots, whose rows learn alone."""
    memory = families.memory_plus(placement="2:2", num_keys=side, top_m=32, num_heads=2, value_dim=64)
    model = ModelConfig(
        embed_dim=256, num_layers=2, num_heads=4, num_kv_heads=4, mlp_dim=512, memories={"memory": memory}
    )
    train = TrainConfig(batch_size=TOKENS[0], trainable="/values$", **selection)  # type: ignore[arg-type]
    return RunConfig(model, DataConfig(seq_len=TOKENS[1]), train)


def measure(repeats: int, tick: Callable[[], object]) -> list[Speed]:
    """Returns medians of the steps of tables of several sizes; the steps of a size take turns.

    Args:
        repeats: steps of each kind that count.
        tick: called after every step.
    """
    found = []
    for side in SIDES:
        runs = {
            "all rows": _run(side),
            "tf_idf": _run(side, slots_per_step=SELECTED, background="counts"),
            "kl": _run(side, slots_per_step=SELECTED, slot_score="kl", background="counts"),
        }
        contenders = {name: model_contender(run, kernels=True) for name, run in runs.items()}
        timings, _ = race(contenders, draw_tokens(runs["all rows"]), repeats, tick)
        for name, timing in timings.items():
            ratio = statistics.median(a / b for a, b in zip(timing.ms, timings["all rows"].ms, strict=True))
            found.append(Speed(side**2, name, statistics.median(timing.ms), ratio, timing.temporary_bytes))
    return found
