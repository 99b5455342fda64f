"""Provides a memory of each kind for a model that has none, sized by the model's width and depth.

A graft is a beginning: every field can be overridden. Its tables are small (65,536 slots each, or rows per
head), and it leaves the layers as they are.
"""

from collections.abc import Callable

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemoryConfig
from ultramem_jax.errors import unknown
from ultramem_jax.presets import families

_NUM_KEYS = 256


def _middle(model: ModelConfig) -> int:
    """Returns the layer in the middle, from 1."""
    return -(-model.num_layers // 2)


def _skipping(model: ModelConfig) -> str:
    """Returns places of two memories, each of which skips over about a quarter of the layers."""
    quarter = max(model.num_layers // 4, 1)
    spans = [(quarter, 2 * quarter), (3 * quarter, 4 * quarter)]
    if model.num_layers < 4:
        spans = [(1, model.num_layers)]
    return "/".join(f"{start}:{end}" for start, end in spans)


def _even(size: int) -> int:
    return max(size // 2, 1) * 2


GRAFTS: dict[str, Callable[[ModelConfig], MemoryConfig]] = {
    "ultramem": lambda model: families.ultramem(
        placement=_skipping(model), num_keys=_NUM_KEYS, value_dim=_even(model.embed_dim // 2)
    ),
    "ultramem_v2": lambda model: families.ultramem_v2(
        placement=_skipping(model),
        num_keys=_NUM_KEYS,
        value_dim=_even(model.embed_dim // 4),
        pre_value_dim=_even(model.embed_dim // 4),
    ),
    "memory_plus": lambda model: families.memory_plus(
        placement=_skipping(model), num_keys=_NUM_KEYS, value_dim=model.embed_dim
    ),
    "pkm": lambda model: families.pkm(
        placement=f"{_middle(model)}:{_middle(model)}", num_keys=_NUM_KEYS, value_dim=model.embed_dim
    ),
    "peer": lambda model: families.peer(
        placement=f"{_middle(model)}:{_middle(model)}",
        num_keys=_NUM_KEYS,
        value_dim=model.embed_dim,
        pre_value_dim=model.embed_dim,
    ),
    "engram": lambda model: families.engram(
        placement=f"before@{min(2, model.num_layers)}", value_dim=max(model.embed_dim // 16, 1)
    ),
    "per_layer_embedding": lambda model: families.per_layer_embedding(
        placement=f"before@{min(2, model.num_layers)}", value_dim=max(model.embed_dim // 4, 1)
    ),
}
"""Memories by the name of their family in `presets.families`, which is also their name in the model."""


def graft(name: str, model: ModelConfig) -> MemoryConfig:
    """Returns the memory of a family for a model.

    Raises:
        UserError: there is no such family.
    """
    if name not in GRAFTS:
        raise unknown("memory to add", name, GRAFTS)
    return GRAFTS[name](model)
