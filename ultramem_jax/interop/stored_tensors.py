"""Describes what the loader of open models needs of a format: named tensors, which are read one by one."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class StoredTensors(Protocol):
    """Holds the tensors of a model in their files, under the names that Hugging Face gives them."""

    @property
    def where(self) -> str:
        """Returns the path of the folder or file, for messages."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by name, linear maps as (out, in)."""

    def dtype(self, name: str) -> str:
        """Returns the name of a tensor's dtype as it is stored, such as `float32`, `bfloat16` or `Q4_K`."""

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in host memory of its own, in a dtype of floats; other tensors stay in the file.

        Raises:
            UserError: its bytes cannot be read.
        """
