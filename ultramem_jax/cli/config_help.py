"""Lists presets by name, and every field of a run's config with its default, for `--help`."""

import dataclasses
import textwrap
from typing import Any

from ultramem_jax.config import MoEConfig, RunConfig
from ultramem_jax.config.memory import PARTS
from ultramem_jax.presets import PRESETS, families

_WIDTH = 110


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
        # Of parts that the model lacks, fields are shown as they are by default.
        parts["model.moe"] = base.model.moe or MoEConfig()
        for name, memory in (base.model.memories or {"NAME": families.ultramem()}).items():
            path = f"model.memories.{name}"
            parts |= {path: memory} | {f"{path}.{part}": getattr(memory, part) for part in PARTS}
    parts |= {"data": base.data, "train": base.train, "mesh": base.mesh}
    lines, hidden = [], parts.keys() | {"model.memories"}
    for name, part in parts.items():
        fields = [field.name for field in dataclasses.fields(part) if f"{name}.{field.name}" not in hidden]
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
