"""Writes the text that a model learns before it is taught new facts: background text, and people among it."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ultramem_jax.data.facts import Population, biography
from ultramem_jax.data.sources import enwik8_source
from ultramem_jax.files import replacing

_PIECE = 2048
"""Bytes of background text that follow each other."""


def write_mixture(path: Path, enwik8: str, num_bytes: int, people: Population, share: float) -> Path:
    """Writes the text, unless it is there, and returns its path.

    Args:
        path: the file.
        enwik8: path of enwik8, whose training split is the background.
        num_bytes: size of the text.
        people: their biographies come again and again, in other words each time.
        share: share of the text that is biographies, in [0, 1).
    """
    if path.exists():
        return path
    (background,) = enwik8_source(enwik8).documents("train")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        biographies, of_people, pieces = _biographies(people), 0, itertools.count(0, _PIECE)
        while (written := file.tell()) < num_bytes:
            if of_people < share * written:
                of_people += file.write(next(biographies) + b"\n\n")
            else:
                start = next(pieces)
                file.write(background.data[start : start + _PIECE] + b"\n\n")
    return path


def _biographies(people: Population) -> Iterator[bytes]:
    """Yields biographies without end: in each round all people in another order, in other words."""
    known = list(people.people())
    for which in itertools.count():
        for index in np.random.default_rng(which).permutation(len(known)):
            yield biography(known[index], which).encode()
