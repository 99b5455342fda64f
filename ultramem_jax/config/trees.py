"""Converts configs to nested dicts, as JSON stores them, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ultramem_jax.config.data import DataConfig
from ultramem_jax.config.field_types import built_at
from ultramem_jax.config.memory import MemoryConfig
from ultramem_jax.config.memory_kinds import ADDRESSERS, READOUTS
from ultramem_jax.config.memory_parts import TableConfig
from ultramem_jax.config.mesh import MeshConfig
from ultramem_jax.config.model import ModelConfig, MoEConfig, RopeScalingConfig
from ultramem_jax.config.old_configs import upgrade_tree
from ultramem_jax.config.run import RunConfig
from ultramem_jax.config.train import TrainConfig
from ultramem_jax.errors import UserError, unknown
from ultramem_jax.registry import Registry
from ultramem_jax.tree_types import JsonDict


def to_dict(config: Any) -> JsonDict:
    """Returns a config as nested plain dicts, for JSON. An absent part is `None`."""
    if isinstance(config, Mapping):
        return {name: to_dict(value) for name, value in config.items()}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {one.name: to_dict(getattr(config, one.name)) for one in dataclasses.fields(config)}
    return config


def run_config_from_dict(tree: JsonDict) -> RunConfig:
    """Returns the `RunConfig` that `to_dict` of this version or an earlier one converted to a tree.

    Raises:
        UserError: an unknown key (with the nearest known one), or a value that is not allowed.
    """
    config: RunConfig = _build(RunConfig, upgrade_tree(tree), "")
    return config


def model_config_from_dict(tree: JsonDict) -> ModelConfig:
    """Returns the `ModelConfig` that `to_dict` of this version converted to a tree.

    Raises:
        UserError: an unknown key, or a value that is not allowed.
    """
    config: ModelConfig = _build(ModelConfig, tree, "model")
    return config


def _part(cls: type, field: str, tree: object, path: str) -> object:
    """Returns the value of a field: the config that its tree describes, or the tree itself for a value."""
    parts: dict[tuple[type, str], type | Registry] = {
        (RunConfig, "model"): ModelConfig,
        (RunConfig, "data"): DataConfig,
        (RunConfig, "train"): TrainConfig,
        (RunConfig, "mesh"): MeshConfig,
        (ModelConfig, "moe"): MoEConfig,
        (ModelConfig, "rope_scaling"): RopeScalingConfig,
        (MemoryConfig, "address"): ADDRESSERS,
        (MemoryConfig, "table"): TableConfig,
        (MemoryConfig, "readout"): READOUTS,
    }
    if (cls, field) == (ModelConfig, "memories"):
        memories = _checked_dict(tree, path, "memories by name")
        return {name: _build(MemoryConfig, memory, f"{path}.{name}") for name, memory in memories.items()}
    part = parts.get((cls, field))
    if part is None or tree is None:
        return tree
    if isinstance(part, Registry):
        fields = _checked_dict(tree, path, "the fields of a kind")
        if "kind" not in fields:
            raise UserError(f"{path}: must have the field 'kind', one of {', '.join(part.kinds())}")
        part = part[str(fields["kind"])]
    return _build(part, tree, path)


def _checked_dict(tree: object, path: str, contents: str) -> Mapping[str, object]:
    """Returns the tree, which must be a dict; the error of any other value names the path."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{path or 'config'} = {tree!r}: must be a dict of {contents}")
    return tree


def _build(cls: type, tree: object, path: str) -> Any:
    """Returns the instance of a config class that its tree describes; errors name fields `path.field`."""
    known = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    for key, value in _checked_dict(tree, path, f"the fields of {cls.__name__}").items():
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
