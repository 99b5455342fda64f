"""Teaches a model new facts by one method, and measures on the way what it learns and what it forgets."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import numpy as np
from tqdm import tqdm

from experiments.forgetting.methods import Method
from experiments.forgetting.records import FineTuning, Point
from ultramem_jax.config import ModelConfig, RunConfig, TrainConfig
from ultramem_jax.data import Tokenizer
from ultramem_jax.parallel.mesh import one_device
from ultramem_jax.training.dense_optimizer import Optimizers, make_optimizers
from ultramem_jax.training.initial import Initial
from ultramem_jax.training.lora import merged
from ultramem_jax.training.slot_selection import background_of
from ultramem_jax.training.state import fresh_state, model_variables
from ultramem_jax.training.step import StepResult, make_train_step
from ultramem_jax.tree_types import ArrayTree


@dataclass(frozen=True)
class Task:
    """Describes how long and on what a model is taught."""

    texts: Sequence[str]
    """Biographies that state the new facts."""
    steps: int
    """Most steps."""
    batch_size: int
    seq_len: int
    check_every: int
    """Steps after which it is checked again whether enough is learned."""
    measure_every: int
    """Steps between two whole measurements, a multiple of `check_every`."""
    enough: float
    """Share of the new facts at which the fine-tuning ends."""
    slots: int
    """Rows of a table that a step may change, where the method selects."""


@dataclass(frozen=True)
class BaseModel:
    """Describes a model before it is taught."""

    system: str
    """Name of the system."""
    config: ModelConfig
    variables: dict[str, ArrayTree]
    """`params`, `memory` and `buffers`, on the host."""
    tokenizer: Tokenizer
    background: str
    """Path of the background reads of its tables."""


class TaskEvaluation(Protocol):
    """Measures what a model knows in the course of a task."""

    def learned(self, variables: dict[str, ArrayTree]) -> float:
        """Returns the share of the new facts that it has learned, in [0, 1]."""

    def point(self, step: int, variables: dict[str, ArrayTree]) -> Point:
        """Returns all that is measured after a step."""


def fine_tune(
    model: BaseModel,
    method: Method,
    rate: float,
    task: Task,
    evaluation: TaskEvaluation,
    seed: int,
) -> tuple[FineTuning, dict[str, ArrayTree]]:
    """Teaches a model until it has learned enough, or has taken all steps.

    Args:
        model: the model.
        method: how it is taught.
        rate: peak of the learning rate.
        task: what it is taught, and for how long.
        evaluation: what is measured on the way.
        seed: of the order of the texts, and of new parameters.

    Returns:
        The record of the run, and the variables after it, on the host. A run whose loss is not finite ends
        with the measurement before, and its variables are of no use.
    """
    began = time.perf_counter()
    config = run_config(model, method, rate, task, seed)
    optimizers, step = _training_step(config)
    given = Initial(model.variables, background=background_of(config))
    state = fresh_state(config, optimizers, one_device(), np.uint32(seed), initial=given)
    points = [evaluation.point(0, merged(model_variables(state), config.train))]
    batches, diverged = packed(task, model.tokenizer, seed), False
    with tqdm(total=task.steps, desc=f"{model.system}: {method.name}", unit="step", leave=False) as bar:
        for number in range(1, task.steps + 1):
            state, metrics = step(state, next(batches))
            bar.update()
            last = number == task.steps
            if number % task.check_every and not last:
                continue
            diverged = not math.isfinite(float(metrics["loss"]))
            if diverged:
                break
            variables = merged(model_variables(state), config.train)
            ends = last or evaluation.learned(variables) >= task.enough
            if ends or number % task.measure_every == 0:
                point = evaluation.point(number, variables)
                diverged = not math.isfinite(point.bits_per_byte + point.learned_nats + point.kept_nats)
                if diverged:
                    break
                points.append(point)
                known = f"learned {points[-1].learned:.0%}, kept {points[-1].kept:.0%}"
                bar.set_postfix_str(f"{known}, {points[-1].bits_per_byte:.3f} bits/byte")
            if ends:
                break
    record = FineTuning(
        model.system,
        method.name,
        rate,
        config.train.slots_per_step,
        seed,
        task.enough,
        points,
        diverged,
        time.perf_counter() - began,
    )
    return record, jax.tree.map(np.asarray, merged(model_variables(state), config.train))


@functools.lru_cache(maxsize=1)
def _training_step(config: RunConfig) -> tuple[Optimizers, Callable[..., StepResult]]:
    """Returns the optimizers of a run and its compiled step, which tasks of a sequence share."""
    optimizers = make_optimizers(config)
    return optimizers, jax.jit(make_train_step(config, optimizers), donate_argnums=0)


def run_config(model: BaseModel, method: Method, rate: float, task: Task, seed: int) -> RunConfig:
    """Returns the run of a task: a constant learning rate after a warm-up of a twentieth."""
    plain = TrainConfig(
        steps=task.steps,
        batch_size=task.batch_size,
        seed=seed,
        warmup_fraction=0.05,
        final_lr_fraction=1.0,
        weight_decay=0.0,
    )
    train = method.train_config(rate, plain, task.slots, model.background)
    # The rate is tuned for each method, so that of rows needs no multiple.
    memories = {
        name: replace(memory, value_lr_multiple=1.0, value_lr_final_multiple=1.0)
        for name, memory in model.config.memories.items()
    }
    config = RunConfig(dataclasses.replace(model.config, memories=memories), train=train)
    return replace(config, data=replace(config.data, seq_len=task.seq_len))


def packed(task: Task, tokenizer: Tokenizer, seed: int) -> Iterator[np.ndarray]:
    """Yields batches (B, S + 1) int32 of texts in random order, one after the other, without end."""
    rng = np.random.default_rng(seed)
    ids = [[*tokenizer.encode(text.encode()), tokenizer.eos_id] for text in task.texts]
    stream = (token for _ in itertools.count() for index in rng.permutation(len(ids)) for token in ids[index])
    shape = task.batch_size, task.seq_len + 1
    while True:
        yield np.fromiter(itertools.islice(stream, shape[0] * shape[1]), np.int32).reshape(shape)
