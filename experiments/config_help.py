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
    return wrapped(f"--preset: {' '.join(PRESETS)}")


def fields_help(base: RunConfig, *, with_model: bool = True) -> list[str]:
    """Returns every field of a config with its value in `base`, as lines of `--help`, by part.

    Args:
        base: config of the experiment.
        with_model: whether to list the fields of the model, which some experiments choose themselves.

    Returns:
        Lines of at most 110 characters.
    """
    parts: dict[str, Any] = {}
    if with_model:
        parts["model"] = base.model
        for name, default in _PARTS.items():
            parts[name] = getattr(base.model, name.removeprefix("model.")) or default
    parts |= {"data": base.data, "train": base.train, "mesh": base.mesh}
    lines = []
    for name, part in parts.items():
        fields = [field.name for field in dataclasses.fields(part) if f"{name}.{field.name}" not in parts]
        shown = " ".join(f"{field}={getattr(part, field)}" for field in fields)
        lines += wrapped(f"--config.{name}: {shown}")
    return lines


def wrapped(text: str) -> list[str]:
    """Returns an entry of `--help` as lines of at most 110 characters, of which the first stands out."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )
