"""Experiments need whole runs: one that was stopped is not taken for its result."""

import signal

import pytest

from experiments.common.whole_runs import train_whole
from tests.support.small_run import small_config
from ultramem_jax.errors import Stopped
from ultramem_jax.training.metrics import MetricWriter


def test_a_run_that_was_stopped_is_not_a_result(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    write = MetricWriter.write

    def stop_at_three(self, step, split, scalars):
        write(self, step, split, scalars)
        if step == 3 and split == "train":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "write", stop_at_three)
    with pytest.raises(Stopped, match="the same command goes on from there"):
        train_whole(config, tmp_path / "run")
    monkeypatch.undo()
    assert train_whole(config, tmp_path / "run").step == config.train.steps > 3
