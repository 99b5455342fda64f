"""Upgrades configs that earlier versions saved to the current fields."""

from ultramem_jax.tree_types import JsonDict

_TABLE_FIELDS = {
    "value_dim": "value_dim",
    "pre_value_dim": "pre_value_dim",
    "project_pre_values": "project_pre_values",
    "pre_value_activation": "pre_value_activation",
    "table_sharing": "sharing",
    "share_ratio": "share_ratio",
    "table_dtype": "dtype",
    "memory_kind": "memory_kind",
    "prefetch": "prefetch",
    "partition": "partition",
}
"""Old name of a field -> its name in `TableConfig`."""
_READOUT_FIELDS = ("project_values", "sum_blocks", "gate")
_OWN_FIELDS = ("placement", "value_lr_multiple")


def upgrade_tree(tree: JsonDict) -> JsonDict:
    """Returns the saved tree of a `RunConfig` in the current fields, whichever version saved it.

    Up to version 0.2 a model had at most one memory, `model.memory`, of product keys, and all its fields were
    in one dict. The upgraded tree names that memory `memory`, as its parameters are named in the checkpoints
    of these versions. Up to then, too, `model.attention_qk_norm` was a boolean, whose True is `all_heads`.
    """
    tree = _with_qk_norm_in_words(tree)
    if not is_old_tree(tree):
        return tree
    model = dict(tree["model"])
    memory = model.pop("memory")
    if memory is None:
        return tree | {"model": model | {"memories": {}}}
    rest = dict(memory)
    if "norm_query_key" in rest:  # before version 0.2
        rest["norm_query"] = rest["norm_keys"] = rest.pop("norm_query_key")
    table = {name: rest.pop(old) for old, name in _TABLE_FIELDS.items() if old in rest}
    readout = {name: rest.pop(name) for name in _READOUT_FIELDS if name in rest}
    own = {name: rest.pop(name) for name in _OWN_FIELDS if name in rest}
    parts = {
        "address": {"kind": "product_keys"} | rest,
        "table": table,
        "readout": {"kind": "projection"} | readout,
    }
    return tree | {"model": model | {"memories": {"memory": own | parts}}}


def _with_qk_norm_in_words(tree: JsonDict) -> JsonDict:
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("attention_qk_norm"), bool):
        return tree
    words = "all_heads" if model["attention_qk_norm"] else "none"
    return tree | {"model": model | {"attention_qk_norm": words}}


def is_old_tree(tree: object) -> bool:
    """Tells whether version 0.2 or an earlier one saved the tree of a `RunConfig`."""
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict) or "memory" not in model or "memories" in model:
        return False
    return model["memory"] is None or isinstance(model["memory"], dict)
