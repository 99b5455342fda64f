"""Makes chunks of tokens small, so that a test sees several."""

import dataclasses

import pytest

from ultramem_jax.ops import chunks
from ultramem_jax.ops.algorithms import algorithms


def set_chunk_values(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    """Makes chunks hold at most so many temporary values."""
    monkeypatch.setattr(chunks, "algorithms", lambda: dataclasses.replace(algorithms(), chunk_values=values))
