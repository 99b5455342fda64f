"""Declares the arrays that each optimizer of rows keeps for a table, with their dtypes and bytes.

`ultramem_jax.training.row_rules` makes these arrays, `ultramem_jax.accounting` counts them, and the configs
refuse options that do not change them.
"""

from typing import Literal, NamedTuple, get_args

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int32": 4}


class RowArray(NamedTuple):
    """Describes one array that an optimizer keeps beside a table (N, d)."""

    name: str
    per: str
    """Shape: `value` is (N, d), a number for each value of a row; `row` is (N, 1), one number per row."""
    dtype: str
    """Stored dtype: `float32`, `bfloat16` (rounded as the table is) or `int32` (never rounded)."""

    def bytes(self, width: int) -> int:
        """Returns the bytes that a row with `width` columns occupies in this array."""
        return _ITEM_BYTES[self.dtype] * (width if self.per == "value" else 1)


RowOptimizer = Literal["adamw", "adamw_catch_up", "adagrad", "adagrad_row", "sgd", "sgd_momentum"]
ROW_OPTIMIZERS: tuple[str, ...] = get_args(RowOptimizer)
"""The values of `TrainConfig.row_optimizer`; `ultramem_jax.training.row_rules` defines them."""


def row_arrays(
    optimizer: str, second_moment: str = "element", moment_dtype: str = "float32"
) -> tuple[RowArray, ...]:
    """Returns the arrays that an optimizer keeps for the rows of a table, in the order of its state.

    Args:
        optimizer: one of `ROW_OPTIMIZERS`.
        second_moment: `TrainConfig.row_second_moment`.
        moment_dtype: `TrainConfig.row_moment_dtype`.
    """
    first = RowArray("first", "value", moment_dtype)
    second = RowArray("second", "value", moment_dtype)
    if second_moment == "row":
        second = RowArray("second", "row", "float32")
    kept: dict[str, tuple[RowArray, ...]] = {
        "adamw": (first, second),
        "adamw_catch_up": (first, second, RowArray("last", "row", "int32")),
        "adagrad": (RowArray("squares", "value", moment_dtype),),
        "adagrad_row": (RowArray("squares", "row", "float32"),),
        "sgd": (),
        "sgd_momentum": (RowArray("trace", "value", moment_dtype),),
    }
    return kept[optimizer]


def takes_means(arrays: tuple[RowArray, ...]) -> bool:
    """Tells whether a step takes a mean over the columns of each row, that is, keeps a float per row."""
    return any(array.per == "row" and array.dtype == "float32" for array in arrays)
