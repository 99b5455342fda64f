"""Brings configs that earlier versions wrote into today's parts."""

from typing import Any

_TABLE = {
    "value_dim": "value_dim",
    "pre_value_dim": "pre_value_dim",
    "project_pre_values": "project_pre_values",
    "pre_value_activation": "pre_value_activation",
    "table_sharing": "sharing",
    "share_ratio": "share_ratio",
    "table_dtype": "dtype",
    "memory_kind": "memory_kind",
    "partition": "partition",
}
_READOUT = ("project_values", "sum_blocks", "gate")
_OWN = ("placement", "value_lr_multiple")


def upgrade_tree(tree: Any) -> Any:
    """Returns the tree of a `RunConfig` with its one memory, if it has one, in today's parts.

    Up to version 0.2 a model had one memory, `model.memory`, of product keys, whose fields were all in one
    dict. It is called `memory` here, as its parameters are in the checkpoints of then.
    """
    if not is_old_tree(tree):
        return tree
    model = dict(tree["model"])
    memory = model.pop("memory")
    if memory is None:
        return tree | {"model": model | {"memories": {}}}
    rest = dict(memory)
    if "norm_query_key" in rest:  # before version 0.2
        rest["norm_query"] = rest["norm_keys"] = rest.pop("norm_query_key")
    table = {name: rest.pop(old) for old, name in _TABLE.items() if old in rest}
    readout = {name: rest.pop(name) for name in _READOUT if name in rest}
    own = {name: rest.pop(name) for name in _OWN if name in rest}
    parts = {
        "address": {"kind": "product_keys"} | rest,
        "table": table,
        "readout": {"kind": "projection"} | readout,
    }
    return tree | {"model": model | {"memories": {"memory": own | parts}}}


def is_old_tree(tree: Any) -> bool:
    """Returns whether an earlier version wrote the tree of a `RunConfig`."""
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict) or "memory" not in model or "memories" in model:
        return False
    return model["memory"] is None or isinstance(model["memory"], dict)
