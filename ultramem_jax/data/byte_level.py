"""Holds what tokenizers share: the characters of bytes, runs of text, and reading and hashing files."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ultramem_jax.config.limits import LARGEST
from ultramem_jax.errors import UserError, one_line, require


def byte_characters() -> dict[int, str]:
    """Returns byte -> the printable character that byte-level BPE writes for it (GPT-2's table).

    Printable Latin-1 characters stand for themselves. The other 68 bytes use the characters from 256 on.
    """
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    table = {byte: chr(byte) for byte in own}
    others = (byte for byte in range(256) if byte not in own)
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


def text_runs(data: bytes) -> Iterator[str | bytes]:
    """Yields bytes as runs of valid UTF-8 (str) and of bytes that are not (bytes), in order."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        # "surrogateescape" turns each undecodable byte b into the lone surrogate 0xDC00 + b.
        text = data.decode("utf-8", "surrogateescape")
    else:
        if text:
            yield text
        return
    for i, run in enumerate(re.split("([\udc80-\udcff]+)", text)):
        if run:
            yield run.encode("utf-8", "surrogateescape") if i % 2 else run


def content_hash(backend: tokenizers.Tokenizer) -> str:
    """Returns a hash of everything that decides which ids a text becomes, 64 hexadecimal digits."""
    tree = json.loads(backend.to_str())
    # Merges are pairs in newer versions of the library, and strings with a blank in older ones.
    if "merges" in tree["model"]:
        merges = tree["model"]["merges"]
        tree["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
    del tree["version"]
    content = json.dumps(_without_nothing(tree), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_backend(path: Path, allowed: str) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
        UserError: there is none, the library cannot read it (`allowed` says what it must be), or an id is
            larger than any vocabulary.
    """
    with library_errors(f"{path}: {allowed}"):
        text = path.read_text(encoding="utf-8")
        _require_ids(json.loads(text), str(path))
        return tokenizers.Tokenizer.from_str(text)


@contextlib.contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Makes any error of the library `tokenizers` a `UserError`: the message, and the library's reason.

    The library raises Exception itself or, where it panics, a BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{message}: {one_line(error)}") from None


def _require_ids(tree: Any, where: str) -> None:
    """Refuses ids for which the library would take gigabytes."""
    vocabulary = tree["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token["id"] for token in tree.get("added_tokens") or ()]
    most = LARGEST["vocab_size"]
    largest = max((i for i in ids if isinstance(i, int)), default=0)
    require(largest < most, f"{where}: largest id", largest, f"must be below {most:,}")


def checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns ids as an array (n,) int64.

    Raises:
        ValueError: an id is not in [0, vocab_size).
    """
    array = np.asarray(ids, np.int64).reshape(-1)
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        raise ValueError(f"ids must be in [0, {vocab_size}), got {array.min()} to {array.max()}")
    return array


def _without_nothing(tree: object) -> object:
    """Returns the tree without null or false entries, which a later version of the library may add."""
    if isinstance(tree, dict):
        return {key: _without_nothing(value) for key, value in tree.items() if value not in (None, False)}
    return [_without_nothing(value) for value in tree] if isinstance(tree, list) else tree
