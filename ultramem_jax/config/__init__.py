"""Configures every choice of a run, in frozen dataclasses that name the source of each default.

A `RunConfig` holds a `ModelConfig` (with its `MemoryConfig`s or `MoEConfig`), a `DataConfig`, a
`TrainConfig` and a `MeshConfig`. They check themselves when they are made, so every config that exists is
valid. The letters are those of the axis legend in `ultramem_jax`.
"""

from ultramem_jax.config.data import DataConfig
from ultramem_jax.config.memory import MemoryConfig
from ultramem_jax.config.mesh import MeshConfig
from ultramem_jax.config.model import ModelConfig, MoEConfig, RopeScalingConfig
from ultramem_jax.config.run import RunConfig
from ultramem_jax.config.train import TrainConfig
from ultramem_jax.config.trees import model_config_from_dict, run_config_from_dict, to_dict

__all__ = [
    "DataConfig",
    "MemoryConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeScalingConfig",
    "RunConfig",
    "TrainConfig",
    "model_config_from_dict",
    "run_config_from_dict",
    "to_dict",
]
