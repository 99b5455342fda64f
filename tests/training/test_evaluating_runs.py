"""A run saves, then evaluates, then ranks: nothing that happens to an evaluation costs a step or a number."""

import math
import signal
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from tests.support.small_run import scalars
from tests.support.users_compiler import memory_analysis
from ultramem_jax import UserError
from ultramem_jax.data import load_corpus
from ultramem_jax.parallel.mesh import one_device as first_device
from ultramem_jax.training import evaluation
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.evaluation import Evaluation, Evaluator
from ultramem_jax.training.loop import train
from ultramem_jax.training.restore import load_model
from ultramem_jax.training.state import abstract_state, fresh_state, model_variables
from ultramem_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def config(config):
    """Records that are means of four steps, and evaluations that no save falls together with, but one."""
    return replace(config, train=replace(config.train, log_every=4, eval_every=3, checkpoint_every=6))


def assert_ends_as(whole, result, workdir):
    assert result.finished
    chex.assert_trees_all_equal(whole[0].state, result.state)
    assert scalars(workdir) == scalars(whole[1])
    assert (result.validation_loss, result.validation_bits_per_byte) == (
        whole[0].validation_loss,
        whole[0].validation_bits_per_byte,
    )


def steps_of(workdir):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.all_steps(), checkpoints.best_step()


def at_batch(monkeypatch, number):
    """SIGTERM comes while this micro-batch of evaluations, counted from 1, is read; returns all that were."""
    make, read = evaluation.eval_batches, []

    def batches(*args):
        for batch in make(*args):
            read.append(batch)
            if len(read) == number:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(evaluation, "eval_batches", batches)
    return read


def test_records_are_means_over_the_steps_since_the_one_before(config, whole, tmp_path):
    each = replace(config, train=replace(config.train, log_every=1))
    train(each, tmp_path, progress=False)
    single, means = ([r for r in scalars(w) if r["split"] == "train"] for w in (tmp_path, whole[1]))
    assert [record["step"] for record in means] == [4, 6]
    for record, steps in zip(means, ([0, 1, 2, 3], [4, 5]), strict=True):
        assert record["loss"] == pytest.approx(np.mean([single[i]["loss"] for i in steps]), rel=1e-12)
        nats, num_bytes = (
            sum(single[i]["loss"] * f(single[i]) for i in steps)
            for f in (lambda r: 1, lambda r: 1 / (r["bits_per_byte"] * np.log(2)))
        )
        assert record["bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-12)
        # What is not a loss is that of the last step.
        assert record["gradient_norm"] == single[steps[-1]]["gradient_norm"]


def test_the_bar_says_what_takes_its_time(config, tmp_path, capsys):
    once = replace(config, train=replace(config.train, steps=1))
    train(once, tmp_path, progress=True)
    bar = capsys.readouterr().err
    assert (
        bar.index(", compiling]") < bar.index(", loss ") < bar.index(", evaluating]") < bar.rindex(", loss ")
    )


def test_an_evaluation_that_fails_costs_no_step(config, whole, tmp_path, monkeypatch):
    saving = replace(config, train=replace(config.train, checkpoint_every=3))

    def fail(*_, **__):
        raise RuntimeError("no memory for the evaluation")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            train(saving, tmp_path, progress=False)
    assert steps_of(tmp_path) == ([3], None)
    assert [record["step"] for record in scalars(tmp_path)] == []
    # The evaluation is made up for, and ranked.
    assert_ends_as(whole, train(saving, tmp_path, progress=False), tmp_path)
    assert steps_of(tmp_path) == ([3, 6], 6)


def test_sigterm_is_served_between_two_batches_of_an_evaluation(config, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        read = at_batch(patch, 2)
        result = train(config, tmp_path, progress=False)
    assert not result.finished and result.step == 3
    assert len(read) == 2  # of four: two batches in two micro-batches each
    assert steps_of(tmp_path) == ([3], None)  # saved, though no save was due
    assert_ends_as(whole, train(config, tmp_path, progress=False), tmp_path)


def test_the_last_evaluation_can_be_stopped_as_well(config, whole, tmp_path, monkeypatch):
    for number in (5, 1):  # of the run, and of the same command once more
        with monkeypatch.context() as patch:
            at_batch(patch, number)
            result = train(config, tmp_path, progress=False)
        assert not result.finished and result.step == 6
    assert_ends_as(whole, train(config, tmp_path, progress=False), tmp_path)


def test_a_validation_loss_that_is_not_finite_stops_the_run_each_time(config, whole, tmp_path, monkeypatch):
    each = replace(config, train=replace(config.train, checkpoint_every=1))
    real = Evaluator.__call__
    said = (
        "validation loss = nan: must be finite; the last good checkpoint is that of step {}, and .* {}, which"
    )

    def fails_at(count):
        calls = []

        def evaluate(*args, **kwargs):
            calls.append(None)
            bad = len(calls) >= count
            return Evaluation(math.nan, math.nan, 1) if bad else real(*args, **kwargs)

        monkeypatch.setattr(Evaluator, "__call__", evaluate)

    fails_at(1)
    for _ in range(2):  # and once more, as nothing has changed
        with pytest.raises(UserError, match=said.format(2, 3)):
            train(each, tmp_path, progress=False)
        assert steps_of(tmp_path) == ([2, 3], None)
    fails_at(2)
    for _ in range(2):
        with pytest.raises(UserError, match=said.format(5, 6)):
            train(each, tmp_path, progress=False)
        fails_at(1)
    monkeypatch.setattr(Evaluator, "__call__", real)
    assert_ends_as(whole, train(each, tmp_path, progress=False), tmp_path)
    assert load_model(tmp_path, "best").step == 6


def test_it_is_made_in_micro_batches_and_needs_no_more_memory_than_a_step(config):
    wide = replace(
        config,
        model=replace(config.model, vocab_size=8192),
        train=replace(config.train, batch_size=64, grad_accumulation=16, eval_batches=1),
    )
    corpus, axes, optimizers = load_corpus(config.data), first_device(), make_optimizers(wide)
    state = abstract_state(wide, optimizers, axes)
    shapes = [jax.ShapeDtypeStruct((4, 17), np.int32), jax.ShapeDtypeStruct((4, 16), np.float32)]
    evaluator = Evaluator(wide, corpus)
    seen = []
    evaluate_batch = evaluator._step
    variables = model_variables(fresh_state(wide, optimizers, axes, np.uint32(0)))
    evaluator._step = lambda *batch: seen.append(batch[1].shape) or evaluate_batch(*batch)
    found = evaluator(variables)
    assert seen == [(4, 17)] * 13  # 51 sequences: all that the split has
    at_once = replace(wide, train=replace(wide.train, grad_accumulation=1))
    expected = Evaluator(at_once, corpus)(variables)
    assert found.tokens == expected.tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)

    evaluation_bytes = memory_analysis(evaluate_batch.lower(model_variables(state), *shapes))
    step = jax.jit(make_train_step(wide, optimizers), donate_argnums=0)
    step_bytes = memory_analysis(step.lower(state, jax.ShapeDtypeStruct((64, 17), np.int32)))
    assert evaluation_bytes.temp_size_in_bytes <= step_bytes.temp_size_in_bytes
