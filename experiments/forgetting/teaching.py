"""Teaches a model new facts by one method, and measures on the way what it learns and what it forgets."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from tqdm import tqdm

from experiments.forgetting.methods import Method
from experiments.forgetting.records import Point, Teaching
from ultramem_jax.config import ModelConfig, RunConfig, TrainConfig
from ultramem_jax.data import Tokenizer
from ultramem_jax.parallel.mesh import one_device
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.initial import Initial
from ultramem_jax.training.lora import merged
from ultramem_jax.training.slot_selection import background_of
from ultramem_jax.training.state import fresh_state, model_variables
from ultramem_jax.training.step import make_train_step
from ultramem_jax.tree_types import ArrayTree


@dataclass(frozen=True)
class Lesson:
    """Describes how long and on what a model is taught."""

    texts: Sequence[str]
    """Biographies that state the new facts."""
    steps: int
    """Most steps."""
    batch_size: int
    seq_len: int
    measure_every: int
    """Steps between two measurements."""
    enough: float
    """Share of the new facts at which the teaching ends."""


@dataclass(frozen=True)
class Pupil:
    """Describes a model before it is taught."""

    system: str
    """Name of the system."""
    config: ModelConfig
    variables: dict[str, ArrayTree]
    """`params`, `memory` and `buffers`, on the host."""
    tokenizer: Tokenizer
    background: str
    """Path of the background reads of its tables."""


def teach(
    pupil: Pupil,
    method: Method,
    rate: float,
    lesson: Lesson,
    measure: Callable[[int, dict[str, ArrayTree]], Point],
    seed: int,
) -> tuple[Teaching, dict[str, ArrayTree]]:
    """Teaches a model until it has learned enough, or has taken all steps.

    Args:
        pupil: the model.
        method: how it is taught.
        rate: peak of the learning rate.
        lesson: what it is taught, and for how long.
        measure: (step, variables) -> what a model with these variables knows.
        seed: of the order of the texts, and of new parameters.

    Returns:
        The record of the run, and the variables after it, on the host. A run whose loss is not finite any
        more ends there.
    """
    began = time.perf_counter()
    config = run_config(pupil, method, rate, lesson, seed)
    optimizers = make_optimizers(config)
    given = Initial({**pupil.variables, "background": background_of(config)})
    state = fresh_state(config, optimizers, one_device(), np.uint32(seed), initial=given)
    step = jax.jit(make_train_step(config, optimizers), donate_argnums=0)
    points = [measure(0, merged(model_variables(state), config.train))]
    batches = packed(lesson, pupil.tokenizer, seed)
    with tqdm(total=lesson.steps, desc=f"{pupil.system}: {method.name}", unit="step", leave=False) as bar:
        for number in range(1, lesson.steps + 1):
            state, _ = step(state, next(batches))
            bar.update()
            if number % lesson.measure_every and number < lesson.steps:
                continue
            points.append(measure(number, merged(model_variables(state), config.train)))
            last = points[-1]
            bar.set_postfix_str(
                f"learned {last.learned:.0%}, kept {last.kept:.0%}, {last.bits_per_byte:.3f} bits"
            )
            if last.learned >= lesson.enough or not math.isfinite(last.bits_per_byte):
                break
    slots = config.train.slots_per_step
    seconds = time.perf_counter() - began
    record = Teaching(pupil.system, method.name, rate, slots, seed, points, seconds)
    return record, jax.tree.map(np.asarray, merged(model_variables(state), config.train))


def run_config(pupil: Pupil, method: Method, rate: float, lesson: Lesson, seed: int) -> RunConfig:
    """Returns the run of a lesson: a constant learning rate after a warm-up of a twentieth."""
    plain = TrainConfig(
        steps=lesson.steps,
        batch_size=lesson.batch_size,
        seed=seed,
        warmup_fraction=0.05,
        final_lr_fraction=1.0,
        weight_decay=0.0,
    )
    train = method.train_config(rate, plain, pupil.background)
    # The rate is tuned for each method, so that of rows needs no multiple.
    memories = {
        name: replace(memory, value_lr_multiple=1.0, value_lr_final_multiple=1.0)
        for name, memory in pupil.config.memories.items()
    }
    config = RunConfig(dataclasses.replace(pupil.config, memories=memories), train=train)
    return replace(config, data=replace(config.data, seq_len=lesson.seq_len))


def packed(lesson: Lesson, tokenizer: Tokenizer, seed: int) -> Iterator[np.ndarray]:
    """Yields batches (B, S + 1) int32 of texts in random order, one after the other, without end."""
    rng = np.random.default_rng(seed)
    ids = [[*tokenizer.encode(text.encode()), tokenizer.eos_id] for text in lesson.texts]
    stream = (token for _ in itertools.count() for index in rng.permutation(len(ids)) for token in ids[index])
    shape = lesson.batch_size, lesson.seq_len + 1
    while True:
        yield np.fromiter(itertools.islice(stream, shape[0] * shape[1]), np.int32).reshape(shape)
