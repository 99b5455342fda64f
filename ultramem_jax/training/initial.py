"""Begins a run with the variables of another model, and grafts memories that it does not have.

A grafted memory adds nothing at first: the last factor of its output that learns is zero
(`ReadoutConfig.last_factors`). So the logits of step 0 are those of the other model, in float32 to the bit.
(In bfloat16 XLA rounds the residual stream where a memory is added, and elsewhere may not.) Rows have no
gradient through a zero, and so the factor learns first.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import UserError, require
from ultramem_jax.ops.rows import from_stored, to_stored
from ultramem_jax.parallel.table_layouts import placement
from ultramem_jax.training.trainable import overlaid
from ultramem_jax.tree_types import ArrayTree, Variables


class Initial(NamedTuple):
    """Describes what a new run begins with, where it does not draw numbers."""

    variables: Variables
    """`params`, `memory` and `buffers`, of float dtypes of any width. What is not in them is drawn. The run
    takes the arrays over: they may be gone after its first step."""
    grafted: Collection[str] = ()
    """Names in `ModelConfig.memories` of memories whose output begins at zero."""
    background: Mapping[str, np.ndarray] = MappingProxyType({})
    """`TrainState.background`, where a run selects rows by it."""

    def trees(self) -> dict[str, Mapping[str, Any]]:
        """Returns what is given by the field of `TrainState` that holds it."""
        fields = {"params": "params", "memory": "tables", "buffers": "buffers"}
        variables = {field: self.variables.get(name, {}) for name, field in fields.items()}
        return {**variables, "background": self.background}


def without(tree: ArrayTree, given: Mapping[str, Any]) -> dict[str, ArrayTree]:
    """Returns a nested dict without the leaves that are given."""
    found: dict[str, ArrayTree] = {}
    for name, value in tree.items():
        if name not in given:
            found[name] = value
        elif isinstance(value, Mapping):
            found[name] = without(value, given[name])
    return found


def with_zero_outputs(
    model: ModelConfig, params: ArrayTree, tables: ArrayTree, grafted: Collection[str]
) -> tuple[ArrayTree, ArrayTree]:
    """Returns parameters and tables in which the grafted memories add nothing.

    Args:
        model: the model's config.
        params: dense parameters.
        tables: arrays of the tables.
        grafted: names of the memories.
    """
    for site in model.sites:
        if site.group not in grafted:
            continue
        factors = site.config.readout.last_factors
        if factors:
            zeros = {name: jnp.zeros_like(params[site.name][name]) for name in factors}
            params = overlaid(params, {site.name: zeros})
        else:
            values = jnp.zeros_like(tables[site.table]["values"])
            tables = overlaid(tables, {site.table: {"values": values}})
    return params, tables


def placed(given: Mapping[str, Any], abstract: ArrayTree, field: str) -> dict[str, ArrayTree]:
    """Returns given variables as the leaves of a state: in its dtypes, and on its devices.

    Args:
        given: a nested dict of arrays.
        abstract: shapes, dtypes and shardings of the state's field.
        field: name of the field, for messages.

    Raises:
        UserError: the state has no such variable, or one of another shape.
    """
    found: dict[str, ArrayTree] = {}
    for name, value in given.items():
        where = f"{field}/{name}"
        if name not in abstract:
            raise UserError(f"--init_from has {where}, which the model of this run does not have")
        leaf = abstract[name]
        if isinstance(value, Mapping):
            found[name] = placed(value, leaf, where)
            continue
        shape = np.shape(value)
        allowed = f"must be {leaf.shape}, as in the model of this run"
        require(shape == leaf.shape, f"--init_from: {where}.shape", shape, allowed)
        found[name] = jax.device_put(_converted(jnp.asarray(value), leaf.dtype), placement(leaf))
    return found


def _converted(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if array.dtype == dtype:
        return array
    stored = jnp.uint16 in (array.dtype, dtype)  # rows in bfloat16
    return to_stored(from_stored(array), dtype) if stored else array.astype(dtype)
