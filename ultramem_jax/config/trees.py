"""Turns configs into nested dicts, as JSON keeps them, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ultramem_jax.config.data import DataConfig
from ultramem_jax.config.field_types import built_at
from ultramem_jax.config.memory import MemoryConfig
from ultramem_jax.config.memory_kinds import ADDRESSERS, READOUTS
from ultramem_jax.config.memory_parts import TableConfig
from ultramem_jax.config.mesh import MeshConfig
from ultramem_jax.config.model import ModelConfig, MoEConfig
from ultramem_jax.config.old_configs import upgrade_tree
from ultramem_jax.config.run import RunConfig
from ultramem_jax.config.train import TrainConfig
from ultramem_jax.errors import UserError, unknown


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as nested plain dicts, for JSON; `None` for an absent part."""
    if isinstance(config, Mapping):
        return {name: to_dict(value) for name, value in config.items()}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {one.name: to_dict(getattr(config, one.name)) for one in dataclasses.fields(config)}
    return config


def run_config_from_dict(tree: dict[str, Any]) -> RunConfig:
    """Returns the `RunConfig` of which `to_dict` made the tree, also where an earlier version did.

    Raises:
        UserError: an unknown key (with the nearest known one), or a value that is not allowed.
    """
    return _build(RunConfig, upgrade_tree(tree), "")


def _part(cls: type, field: str, tree: Any, path: str) -> Any:
    """Returns the config that a field holds, or the value itself where it is not one."""
    parts: dict[tuple[type, str], Any] = {
        (RunConfig, "model"): ModelConfig,
        (RunConfig, "data"): DataConfig,
        (RunConfig, "train"): TrainConfig,
        (RunConfig, "mesh"): MeshConfig,
        (ModelConfig, "moe"): MoEConfig,
        (MemoryConfig, "address"): ADDRESSERS,
        (MemoryConfig, "table"): TableConfig,
        (MemoryConfig, "readout"): READOUTS,
    }
    if (cls, field) == (ModelConfig, "memories"):
        _require_dict(tree, path, "memories by name")
        return {name: _build(MemoryConfig, of, f"{path}.{name}") for name, of in tree.items()}
    part = parts.get((cls, field))
    if part is None or tree is None:
        return tree
    if part in (ADDRESSERS, READOUTS):
        _require_dict(tree, path, "the fields of a kind")
        if "kind" not in tree:
            raise UserError(f"{path}: must have the field 'kind', one of {', '.join(part.kinds())}")
        part = part[str(tree["kind"])]
    return _build(part, tree, path)


def _require_dict(tree: Any, path: str, of: str) -> None:
    if not isinstance(tree, Mapping):
        raise UserError(f"{path or 'config'} = {tree!r}: must be a dict of {of}")


def _build(cls: type, tree: Any, path: str) -> Any:
    _require_dict(tree, path, f"the fields of {cls.__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if key not in known:
            raise unknown(f"config key {where!r}:", str(key), known)
        values[key] = _part(cls, key, value, where)
    needed = {RunConfig: ("model", "data", "train"), MemoryConfig: ("address",)}.get(cls, ())
    for part in needed:
        if part not in values:
            raise UserError(f"{path or 'config'}: must have the part {part!r}")
    with built_at(path):
        return cls(**values)
