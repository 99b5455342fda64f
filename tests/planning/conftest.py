"""Runs programs in this process, on one device, with the promotion of dtypes that users have."""

import pytest

from tests.support.fixtures import one_device, standard_promotion
from tests.support.planned import compiled_tiny
from tests.support.programs import on_one_device, run, text

__all__ = ["compiled", "on_one_device", "one_device", "run", "standard_promotion", "text"]


@pytest.fixture
def compiled():
    """Returns the compiled step of the run that is counted by hand."""
    return compiled_tiny()
