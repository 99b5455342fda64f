"""Tells whether something is what it was when a file was made from it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ultramem_jax.config import ModelConfig, to_dict
from ultramem_jax.nested import leaves
from ultramem_jax.training.background import load_background
from ultramem_jax.tree_types import ArrayTree


def fingerprint(config: ModelConfig, variables: Mapping[str, ArrayTree]) -> str:
    """Returns a hash of a model's config and of all its arrays."""
    return _hashed(repr(to_dict(config)), variables)


def background_fingerprint(path: Path) -> str:
    """Returns a hash of the counts in a file of background reads."""
    reads, _ = load_background(path)
    return _hashed("background", {table: of._asdict() for table, of in reads.items()})


def _hashed(words: str, arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(words.encode())
    for path, leaf in leaves(arrays):
        array = np.asarray(leaf)
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
