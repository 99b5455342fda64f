"""Experiments need whole runs: one that was stopped is not taken for its result."""

import pytest

from experiments.common.whole_runs import train_whole
from tests.support.small_run import small_config, stop_at_three
from ultramem_jax.errors import Stopped


def test_a_run_that_was_stopped_is_not_a_result(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    stop_at_three(monkeypatch)
    with pytest.raises(Stopped, match="the same command goes on from there"):
        train_whole(config, tmp_path / "run")
    monkeypatch.undo()
    assert train_whole(config, tmp_path / "run").step == config.train.steps > 3
