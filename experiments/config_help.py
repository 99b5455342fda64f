"""Lists presets by name, and every field of a run's config with its default, for `--help`."""

import dataclasses
import textwrap
from typing import Any

from ultramem_jax.config import MemoryConfig, MoEConfig, RunConfig
from ultramem_jax.presets import PRESETS

_WIDTH = 110
_PARTS = {"model.memory": MemoryConfig(), "model.moe": MoEConfig()}
"""Parts that a model may lack; their fields are then shown as they are by default."""


def presets_help() -> list[str]:
    """Returns the names of all presets as lines of `--help`."""
    return _wrapped("--preset: ", list(PRESETS))


def fields_help(base: RunConfig) -> list[str]:
    """Returns every field of a config with its value in `base`, as lines of `--help`, by part."""
    parts: dict[str, Any] = {
        "model": base.model,
        **_PARTS,
        "data": base.data,
        "train": base.train,
        "mesh": base.mesh,
    }
    for name in _PARTS:
        own = getattr(base.model, name.removeprefix("model."))
        parts[name] = own or parts[name]
    lines = []
    for name, part in parts.items():
        fields = [field.name for field in dataclasses.fields(part) if f"{name}.{field.name}" not in parts]
        lines += _wrapped(f"--config.{name}: ", [f"{field}={getattr(part, field)}" for field in fields])
    return lines


def _wrapped(heading: str, words: list[str]) -> list[str]:
    return textwrap.wrap(
        heading + " ".join(words),
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )
