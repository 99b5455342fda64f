"""Maps the entries of a state dict to variables of this project, and converts between their layouts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ultramem_jax.errors import UserError, require

Path = tuple[str, ...]
_NAMED = 8
"""Number of entries that an error names."""


def compare_names(given: Iterable[str], expected: Sequence[str], what: str, whose: str) -> None:
    """Refuses names that are missing, or that should not be there.

    Args:
        given: names that are there.
        expected: names that must be there, and no others.
        what: what has the names, for the message.
        whose: what does not have the others, for the message: "the layers do".

    Raises:
        UserError: they differ; the message gives the first names of each kind.
    """
    there, known = set(given), set(expected)
    missing = [name for name in expected if name not in there]
    extra = sorted(there - known, key=str)
    complaints = [f"has no {_some(missing)}"] if missing else []
    complaints += [f"has {_some(extra)}, which {whose} not have"] if extra else []
    if complaints:
        raise UserError(f"{what} {'; it '.join(complaints)}")


def _some(names: Sequence[str]) -> str:
    """Returns the names, or only the first of many: a file of another model lacks thousands."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def check_index(array: np.ndarray, limit: int | None, field: str) -> None:
    """Refuses integers that are out of range: a layer reads rows at such numbers without checking them.

    Args:
        array: integers.
        limit: exclusive upper bound. None means a permutation, in which each number occurs once.
        field: name of the array, for the message.

    Raises:
        UserError: a number is not in [0, limit), or the array is no permutation.
    """
    most = array.size if limit is None else limit
    span = (int(array.min()), int(array.max()))
    require(span[0] >= 0 and span[1] < most, field, span, f"its range must be within [0, {most})")
    if limit is None:
        seen = np.zeros(array.size, np.bool_)
        seen[array] = True
        distinct = int(np.count_nonzero(seen))
        require(distinct == array.size, field, f"{distinct} distinct addresses", f"must be {array.size}")


def same(array: np.ndarray) -> np.ndarray:
    """Returns the array as it is."""
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    """Returns the matrix of a linear map, (out, in), as (in, out), and back."""
    return array.T


@dataclass(frozen=True)
class Entry:
    """Describes one variable, and the array or arrays of the state dict that it consists of."""

    path: Path
    """Collection, modules and name of the variable."""
    names: tuple[str, ...]
    """Names in the state dict: one name, or with `axis` one for each index of that axis."""
    shape: tuple[int, ...]
    """Shape of the array under each name."""
    to_variable: Callable[[np.ndarray], np.ndarray] = same
    to_state: Callable[[np.ndarray], np.ndarray] = same
    """Inverse of `to_variable`."""
    axis: int | None = None
    """Axis of the variable along which the arrays are stacked; None for a variable that is one array."""
    constant: bool = False
    """True for an array of integers."""
    index: bool = False
    """True for a constant at whose numbers rows are read, which `check_index` checks."""
    limit: int | None = None
    """Exclusive upper bound of an index. None means a permutation, in which each number occurs once."""

    def pack(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
        """Returns the variable from the arrays under `names`, each of shape `shape`; takes one at a time."""
        stacked: np.ndarray | None = None
        for index, array in enumerate(arrays):
            part = self.to_variable(array)
            if self.axis is None:
                return part
            if stacked is None:
                stacked = np.empty(self.variable_shape, part.dtype)
            np.moveaxis(stacked, self.axis, 0)[index] = part
        assert stacked is not None
        return stacked

    def unpack(self, variable: np.ndarray) -> list[np.ndarray]:
        """Returns the arrays under `names` from the variable, in C order. It is the inverse of `pack`."""
        return [np.array(self.part(variable, index), order="C") for index in range(len(self.names))]

    def part(self, variable: np.ndarray, index: int) -> np.ndarray:
        """Returns the array under the name of an index, as a view of the variable where that is possible."""
        return self.to_state(variable if self.axis is None else np.moveaxis(variable, self.axis, 0)[index])

    @property
    def variable_shape(self) -> tuple[int, ...]:
        """Returns the shape of the variable."""
        # A view of a single number takes no memory, whatever the shape.
        shape = self.to_variable(np.broadcast_to(np.float32(0), self.shape)).shape
        if self.axis is None:
            return shape
        return (*shape[: self.axis], len(self.names), *shape[self.axis :])
