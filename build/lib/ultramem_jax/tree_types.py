"""Names the types of the nested containers that JAX, Flax and JSON use, whose contents no type can list."""

from collections.abc import Mapping
from typing import Any, TypeAlias

ArrayTree: TypeAlias = Any
"""A pytree whose leaves are arrays, shapes of arrays, or shardings: parameters, gradients, moments."""

Variables: TypeAlias = Mapping[str, Any]
"""Flax's variables: collection (`params`, `memory`, `buffers`) -> a pytree of arrays."""

JsonDict: TypeAlias = dict[str, Any]
"""A dict as `json` reads and writes it: strings, numbers, booleans, None, lists and dicts."""
