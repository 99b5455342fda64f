"""Declares what each optimizer of rows keeps for a row of a table: arrays, their dtypes and their bytes.

`ultramem_jax.training.row_rules` makes these arrays, `ultramem_jax.accounting` counts them, and the configs
refuse options that change none of them.
"""

from typing import Literal, NamedTuple, get_args

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int32": 4}


class RowArray(NamedTuple):
    """Describes one array that an optimizer keeps beside a table (N, d)."""

    name: str
    per: str
    """`value`: (N, d), a number for each value of a row; `row`: (N, 1), one for all of them."""
    dtype: str
    """`float32`, `bfloat16` (rounded as the table is) or `int32` (never rounded)."""

    def bytes(self, width: int) -> int:
        """Returns the bytes that a row with `width` columns occupies in it."""
        return _ITEM_BYTES[self.dtype] * (width if self.per == "value" else 1)


RowOptimizer = Literal["adamw", "adamw_catch_up", "adagrad", "adagrad_row", "sgd", "sgd_momentum"]
ROW_OPTIMIZERS: tuple[str, ...] = get_args(RowOptimizer)
"""The values of `TrainConfig.row_optimizer`; `ultramem_jax.training.row_rules` defines them."""


def row_arrays(
    optimizer: str, second_moment: str = "element", moment_dtype: str = "float32"
) -> tuple[RowArray, ...]:
    """Returns what an optimizer keeps for a row, in the order of its state.

    Args:
        optimizer: of `ROW_OPTIMIZERS`.
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
    """Tells whether a step takes a mean over the columns of each row: it keeps one as a float."""
    return any(array.per == "row" and array.dtype == "float32" for array in arrays)
