"""Selects the parameters that learn, by `TrainConfig.trainable`; the others have no gradient and no state.

A parameter's name is its path in the tree, `layer_3/attention/w_query`; an array of a table is named
`ultramem_0/values`.
"""

import re
from collections.abc import Mapping
from typing import Any

from ultramem_jax.errors import require
from ultramem_jax.nested import leaves, put
from ultramem_jax.tree_types import ArrayTree

_SHOWN = 4
"""Number of names that an error gives as examples."""


def selected(tree: ArrayTree, pattern: str) -> dict[str, ArrayTree]:
    """Returns the part of a nested dict whose leaves have names in which the regular expression is found."""
    found: dict[str, ArrayTree] = {}
    for path, value in leaves(tree):
        if re.search(pattern, "/".join(path)):
            put(found, path, value)
    return found


def overlaid(tree: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, ArrayTree]:
    """Returns the nested dict `tree` with the leaves of `part` in their places."""
    found = dict(tree)
    for name, value in part.items():
        nested = isinstance(value, Mapping) and name in tree
        found[name] = overlaid(tree[name], value) if nested else value
    return found


def names(tree: ArrayTree) -> list[str]:
    """Returns the names of all leaves of a nested dict."""
    return ["/".join(path) for path, _ in leaves(tree)]


def require_some(params: ArrayTree, tables: ArrayTree, pattern: str) -> None:
    """Refuses a pattern that no parameter matches.

    Raises:
        UserError: no name of a parameter or of a table's array matches; the message gives a few names.
    """
    known = [*names(params), *names(tables)]
    some = any(re.search(pattern, name) for name in known)
    examples = ", ".join([*known[:_SHOWN], *known[-1:]])
    require(some, "train.trainable", pattern, f"must match the name of a parameter, such as {examples}")
