"""Lists presets by name, and every field of a run's config with its default, for `--help`."""

import dataclasses
import textwrap
from typing import TYPE_CHECKING

from ultramem_jax.config import MoEConfig, RunConfig
from ultramem_jax.config.memory import PARTS
from ultramem_jax.presets import PRESETS, families

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_WIDTH = 110


def presets_help() -> list[str]:
    """Returns the names of all presets as lines of `--help`."""
    return wrapped(f"--preset: {' '.join(PRESETS)}")


def fields_help(base: RunConfig, *, with_model: bool = True) -> list[str]:
    """Returns every field of a config with its value in `base`, as lines of `--help`, part by part.

    Args:
        base: config of the command or experiment.
        with_model: whether to list the fields of the model; some experiments choose their models themselves.

    Returns:
        Lines of at most 110 characters.
    """
    parts: dict[str, DataclassInstance] = {}
    if with_model:
        parts["model"] = base.model
        # A part that the model lacks is shown with its default values.
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
    """Wraps an entry of `--help` at 110 characters; all lines but the first have a deeper indent."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )
