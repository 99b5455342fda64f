"""Runs programs in this process, on one device, with the promotion of dtypes that users have."""

import pytest

from experiments.common import figures
from tests.support.fixtures import one_device, standard_promotion
from tests.support.programs import on_one_device, run, text

__all__ = ["drawn", "on_one_device", "one_device", "run", "standard_promotion", "text"]


@pytest.fixture
def drawn(monkeypatch):
    """Returns the figures that are drawn, kept for a look at what is in them."""
    kept, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
    return kept
