"""Writes the text that a model learns before it is taught new facts: background text, and people among it."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ultramem_jax.data.facts import Population, biography
from ultramem_jax.data.sources import enwik8_source
from ultramem_jax.errors import UserError
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

    Raises:
        UserError: the file is there and holds another text, from which something may have been trained.
    """
    (background,) = enwik8_source(enwik8).documents("train")
    biographies, of_people, pieces = _biographies(people), 0, itertools.count(0, _PIECE)
    text = bytearray()
    while len(text) < num_bytes:
        if of_people < share * len(text):
            of_one = next(biographies) + b"\n\n"
            of_people += len(of_one)
            text += of_one
        else:
            start = next(pieces)
            text += background.data[start : start + _PIECE] + b"\n\n"
    if path.exists():
        if path.read_bytes() != text:
            raise UserError(f"{path}: holds another text than that of these people; give another --workdir")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(text)
    return path


def _biographies(people: Population) -> Iterator[bytes]:
    """Yields biographies without end: in each round all people in another order, in other words."""
    known = list(people.people())
    for which in itertools.count():
        for index in np.random.default_rng(which).permutation(len(known)):
            yield biography(known[index], which).encode()
