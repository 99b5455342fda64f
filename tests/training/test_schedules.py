import math

import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.config import TrainConfig
from ultramem_jax.training.schedules import learning_rate, value_learning_rate, warmup_steps


def test_warm_up_then_cosine_to_ten_percent():
    rate = learning_rate(TrainConfig(steps=100, learning_rate=1.0, warmup_fraction=0.1))
    # Steps count from 0 and take the rate of the step that they complete: 1/10 first, the peak tenth.
    assert [float(rate(s)) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    halfway = 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2
    assert float(rate(54)) == pytest.approx(halfway)
    assert float(rate(99)) == pytest.approx(0.1)


def test_single_step_runs_at_some_rate():
    assert float(learning_rate(TrainConfig(steps=1))(0)) > 0


def test_values_learn_at_a_multiple_that_falls_linearly_to_one():
    config = TrainConfig(steps=101, learning_rate=1.0, warmup_fraction=0.0, final_lr_fraction=1.0)
    multiple = value_learning_rate(config, 10.0)
    assert [float(multiple(jnp.asarray(s))) for s in (0, 50, 100)] == pytest.approx([10.0, 5.5, 1.0])
    # Beyond the last step, in a run that is carried on, it stays at one and never turns negative.
    assert float(multiple(jnp.asarray(500))) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "fraction, steps, expected",
    [
        (0.07, 100, 7),  # as floats 7.000000000000001
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.55, 100, 55),
        (0.01, 1000, 10),
        (0.01, 1001, 11),  # 10.01, rounded up
        (0.1, 1, 1),
        (0.05, 600, 30),
        (1e-05, 100_000, 1),
        (1e-05, 100_001, 2),
        (0.0, 100, 0),
        (1 / 3, 9, 3),
        (0.1 + 0.2, 10, 3),
        (np.float32(0.07), 100, 7),
    ],
)
def test_warm_up_takes_the_share_that_was_written(fraction, steps, expected):
    config = TrainConfig(steps=steps, warmup_fraction=fraction, learning_rate=1.0)
    assert warmup_steps(config) == expected
    if 1 < expected < steps:  # the peak is reached there, and not before
        rate = learning_rate(config)
        assert float(rate(expected - 1)) == pytest.approx(1.0)
        assert float(rate(expected - 2)) == pytest.approx(1 - 1 / expected)
