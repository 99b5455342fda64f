"""Describes the row rules that the kernel `update_rows` knows."""

from dataclasses import dataclass

import numpy as np

RULES = ("adamw", "adamw_catch_up", "adagrad", "adagrad_row", "sgd", "sgd_momentum")
"""Rules by their number in `sources/update.cc`."""


@dataclass(frozen=True)
class RowKernel:
    """Describes a rule of `training.row_rules` to the kernel."""

    name: str
    """One of `RULES`."""
    weight_decay: float = 0.0
    b1: float = 0.0
    b2: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    one_per_row: bool = False
    """Whether the second moment, or the sum of squares, is one number for all values of a row."""

    def attributes(self) -> dict[str, np.generic]:
        """Returns the attributes of a call."""
        return {
            "rule": np.int64(RULES.index(self.name)),
            "weight_decay": np.float32(self.weight_decay),
            "b1": np.float32(self.b1),
            "b2": np.float32(self.b2),
            "eps": np.float32(self.eps),
            "eps_squared": np.float32(self.eps**2),
            "momentum": np.float32(self.momentum),
            "one_per_row": np.int64(self.one_per_row),
        }
