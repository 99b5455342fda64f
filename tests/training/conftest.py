"""Trains with the promotion of dtypes that users have."""

import pytest

from tests.support.checkpoint_states import copy, saved, warnings
from tests.support.fixtures import one_device, standard_promotion
from tests.support.small_run import small_config
from ultramem_jax.training.loop import train

__all__ = ["config", "copy", "one_device", "saved", "standard_promotion", "warnings"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The run of `small_config`."""
    return small_config(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run without an interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    return train(config, workdir, progress=False), workdir
