"""Keeps a tokenized corpus: one file of token ids per split, and a description of them.

`SPLIT.tokens` holds the ids of a split end to end, little-endian, without a header; `corpus.json` says how
many there are, and what they are. Files are mapped into host memory, so that opening them reads nothing.
"""

import json
from pathlib import Path
from typing import BinaryIO, TypedDict, cast, get_type_hints

import numpy as np

from ultramem_jax.data.sources import SPLITS
from ultramem_jax.errors import UserError, require

_DESCRIPTION = "corpus.json"


class Description(TypedDict):
    """Describes the tokens of a corpus."""

    corpus_hash: str
    """The sha256 of `sources.CorpusHash`."""
    dataset: str
    tokenizer: str
    tokenizer_hash: str
    """The `Tokenizer.fingerprint`."""
    vocab_size: int
    num_tokens: dict[str, int]
    """Tokens per split, with those that begin and end each document."""
    num_bytes: dict[str, int]
    """Bytes per split, only of the documents."""
    num_documents: dict[str, int]


def append_tokens(file: BinaryIO, ids: np.ndarray, vocab_size: int) -> None:
    """Appends token ids (n,), all in [0, vocab_size), to the file of a split."""
    file.write(ids.astype(_dtype(vocab_size)).tobytes())


def tokens_path(folder: Path, split: str) -> Path:
    """Returns the file that holds the tokens of a split."""
    return folder / f"{split}.tokens"


def write_description(folder: Path, description: Description) -> None:
    """Writes the description of the tokens in `folder`."""
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def read_description(folder: Path) -> Description:
    """Returns the description of the tokens in `folder`.

    Raises:
        UserError: the file is missing or damaged, or lacks a split.
    """
    path = folder / _DESCRIPTION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: must be what describes the tokens beside it; {made_again(folder)}"
        ) from error
    whole = isinstance(found, dict) and all(
        _is_of(kind, found.get(name)) for name, kind in get_type_hints(Description).items()
    )
    require(whole, str(path), _DESCRIPTION, f"must describe the tokens beside it; {made_again(folder)}")
    return cast(Description, found)


def open_tokens(folder: Path, split: str) -> np.ndarray:
    """Returns the token ids of a split, (num_tokens,) uint16, or int32 for more than 65,536 ids; read-only.

    Raises:
        UserError: the file is missing, or longer or shorter than its description says.
    """
    description, path = read_description(folder), tokens_path(folder, split)
    size, dtype = description["num_tokens"][split], _dtype(description["vocab_size"])
    expected = size * dtype.itemsize
    found = path.stat().st_size if path.is_file() else 0
    require(found == expected, str(path), f"{found:,} bytes", f"must have {expected:,}; {made_again(folder)}")
    return np.memmap(path, dtype, "r", shape=(size,)) if size else np.empty(0, dtype)


def _is_of(kind: object, value: object) -> bool:
    """Checks the value of a field of `Description`; counts are those of every split."""
    if kind in (str, int):
        return type(value) is kind
    return isinstance(value, dict) and all(type(value.get(split)) is int for split in SPLITS)


def made_again(folder: Path) -> str:
    """Returns what to do about a damaged corpus, for messages."""
    return f"delete the folder {folder}, and it is made again"


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")
