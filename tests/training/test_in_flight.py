"""Steps ahead of the host: all are looked at, in order, and no number depends on how many are in flight."""

import json
import math
import signal
from dataclasses import fields as fields_of
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.errors import UserError
from ultramem_jax.parallel import distributed
from ultramem_jax.parallel.distributed import PeriodicQuestion
from ultramem_jax.training import in_flight, loop
from ultramem_jax.training.in_flight import MOST_AHEAD, StepsInFlight
from ultramem_jax.training.loop import train
from ultramem_jax.training.metrics import MetricWriter
from ultramem_jax.training.profiling import Profile
from ultramem_jax.training.stopping import StopOnSigterm


def _add(steps, number):
    steps.add(number, {"loss": jnp.float32(number)}, jnp.int32(10 * number))


def test_steps_come_out_in_order_with_their_numbers():
    steps = StepsInFlight()
    _add(steps, 1)
    # The first step compiles, and may fail: nothing is ahead of it.
    assert [tuple(one) for one in steps.finished(math.nan)] == [(1, {"loss": 1.0}, 10)]
    for number in range(2, 40):
        _add(steps, number)
    first = [one.step for one in steps.finished(1e-9)]
    assert first == list(range(2, 40 - MOST_AHEAD))
    assert [one.step for one in steps.finished(1e-9, wait_for_all=True)] == list(range(40 - MOST_AHEAD, 40))
    assert list(steps.finished(1e-9, wait_for_all=True)) == []


@pytest.mark.parametrize("seconds, ahead", [(2.0, 1), (0.5, 1), (0.2, 2), (0.1, 5), (0.01, MOST_AHEAD)])
def test_half_a_second_is_in_flight_and_at_least_one_step(seconds, ahead):
    steps = StepsInFlight()
    for number in range(1, 13):
        _add(steps, number)
    assert [one.step for one in steps.finished(seconds)] == list(range(1, 13 - ahead))


def test_the_speed_is_right_if_the_host_reads_several_steps_at_once(monkeypatch):
    # Data stalls for a second every eight steps; then the host reads what the device has finished meanwhile.
    reads = [0.0, *(1.25 * (step // 8) + 0.001 * (step % 8) + 1 for step in range(1, 41))]
    clock = iter(reads)
    monkeypatch.setattr(in_flight.time, "perf_counter", lambda: next(clock))
    steps = StepsInFlight()
    for number in range(1, 41):
        _add(steps, number)
        list(steps.finished(math.nan))
    assert steps.seconds_per_step() == pytest.approx((reads[40] - reads[20]) / 20) == pytest.approx(0.16, 0.2)
    assert steps.seconds_without_first() == pytest.approx((reads[40] - reads[1]) / 39)


def test_speeds_leave_out_the_first_step_and_what_is_no_step(monkeypatch):
    times = iter([0.0, 9.0, 10.0, 100.0, 101.0])  # made, step 1, step 2, restarted, step 3
    monkeypatch.setattr(in_flight.time, "perf_counter", lambda: next(times))
    steps = StepsInFlight()
    assert math.isnan(steps.seconds_per_step()) and math.isnan(steps.seconds_without_first())
    for number in (1, 2):
        _add(steps, number)
        list(steps.finished(math.nan, wait_for_all=True))
    steps.restart_clock()
    _add(steps, 3)
    list(steps.finished(math.nan, wait_for_all=True))
    assert steps.seconds_per_step() == 1.0 and steps.seconds_without_first() == 1.0


def _records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # Times differ from run to run.
    return [
        {name: value for name, value in row.items() if "second" not in name and name != "time"}
        for row in rows
    ]


def test_no_number_depends_on_the_steps_in_flight(config, tmp_path, monkeypatch):
    config = replace(config, train=replace(config.train, log_every=1))
    ahead = train(config, tmp_path / "ahead", progress=False)
    monkeypatch.setattr(in_flight, "_steps_ahead", lambda seconds: 0)
    one_by_one = train(config, tmp_path / "one", progress=False)
    assert _records(tmp_path / "ahead") == _records(tmp_path / "one")
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), ahead.state, one_by_one.state)
    assert all(jax.tree.leaves(same))


def test_no_row_is_written_after_a_loss_that_is_not_finite(config, tmp_path, monkeypatch):
    make, tables = loop.make_train_step, []

    def poisoned(*args, **kwargs):
        step = make(*args, **kwargs)

        def at_three(state, tokens, halted):
            state, metrics = step(state, tokens, halted)
            jax.debug.callback(
                lambda number, values: tables.append((int(number), values)), state.step, state.tables
            )
            return state, metrics | {"loss": jnp.where(state.step == 3, jnp.inf, metrics["loss"])}

        return at_three

    monkeypatch.setattr(loop, "make_train_step", poisoned)
    monkeypatch.setattr(in_flight, "_steps_ahead", lambda seconds: 3)
    config = replace(config, train=replace(config.train, checkpoint_every=0, eval_every=0, log_every=100))
    with pytest.raises(UserError, match=r"^step 3: loss = inf: must be finite; there is no checkpoint yet"):
        train(config, tmp_path, progress=False)
    jax.effects_barrier()
    of_steps = dict(tables)
    assert len(of_steps) > 3, "the device was ahead of the host"
    for step in range(1, max(of_steps)):
        same = all(jax.tree.leaves(jax.tree.map(np.array_equal, of_steps[step], of_steps[step + 1])))
        assert same == (step >= 3), step
    assert not (tmp_path / "metrics.jsonl").exists() or not _records(tmp_path)


def test_sigterm_is_followed_before_the_next_step(config, tmp_path, monkeypatch):
    monkeypatch.setattr(MetricWriter, "write", lambda *_: signal.raise_signal(signal.SIGTERM))
    config = replace(config, train=replace(config.train, log_every=1))
    assert train(config, tmp_path, progress=False).step == 1


def _two_processes(monkeypatch, other):
    """Lets this process be the first of two; `other` gives what the second one answers, by question."""
    asked = []

    def gather(answer):
        asked.append(answer.tolist())
        return np.stack([answer, np.asarray(other(len(asked)), answer.dtype)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    return asked


def test_processes_ask_each_other_at_the_same_steps(monkeypatch):
    # The other process is faster, and stops at last.
    asked = _two_processes(monkeypatch, lambda question: (question == 5, 0.01))
    question = PeriodicQuestion(seconds=2.0)
    answers = [question(False, step, math.nan if step == 1 else 0.5) for step in range(1, 16)]
    # After the first step, whose speed is not known, in the next; two steps later, and every four of half a
    # second.
    np.testing.assert_array_equal(asked, [[0, math.nan], [0, 0.5], [0, 0.5], [0, 0.5], [0, 0.5]])
    assert [step for step, answer in enumerate(answers, 1) if answer] == [1 + 1 + 2 + 4 + 4]
    assert question.seconds_per_step == 0.5  # the first process's


def test_a_wrong_speed_does_not_silence_the_question(monkeypatch):
    asked = _two_processes(monkeypatch, lambda question: (False, 1.0))
    question = PeriodicQuestion(seconds=2.0)
    for step in range(1, 40):
        question(False, step, 1e-6)
    assert len(asked) == 5  # in steps 1, 3, 7, 15 and 31


def test_sigterm_in_another_process_ends_an_evaluation(monkeypatch):
    _two_processes(monkeypatch, lambda question: (question == 3, 0.5))
    monkeypatch.setattr(loop, "model_variables", lambda state: state)
    batches = []

    def evaluate(variables, before_batch):
        for batch in range(400):
            before_batch()
            batches.append(batch)
        raise AssertionError("the whole evaluation ran")

    fields = dict.fromkeys(field.name for field in fields_of(loop._Run))
    run = loop._Run(**fields | {"evaluator": evaluate, "stop": StopOnSigterm()})
    assert run._evaluate(7, None) is False
    assert len(batches) < 10


def test_one_process_asks_itself_in_every_step():
    question = PeriodicQuestion(seconds=1e9)
    assert [question(step == 3, step, 1.0) for step in (1, 2, 3)] == [False, False, True]


def test_a_profile_is_of_a_few_steps(config, tmp_path):
    train(config, tmp_path / "run", progress=False, profile=Profile(tmp_path / "profile", skip=2, steps=2))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_short_run_is_profiled_and_a_failed_one_leaves_no_profile_running(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "checked_metrics", lambda metrics: [next(iter(metrics))])
        patch.setattr(loop._Run, "_require_finite", _fail)
        with pytest.raises(UserError, match="too bad"):
            train(config, tmp_path / "bad", progress=False, profile=Profile(tmp_path / "first", skip=1))
    assert list((tmp_path / "first").rglob("*.xplane.pb"))
    short = replace(config, train=replace(config.train, steps=4))
    train(short, tmp_path / "run", progress=False, profile=Profile(tmp_path / "second"))
    assert list((tmp_path / "second").rglob("*.xplane.pb"))


def _fail(self, values, step):
    if step > 1:
        raise UserError("too bad")
