"""Provides complete runs that come with the library; `--config=NAME` selects one by its name."""

import importlib

from ultramem_jax.config import RunConfig
from ultramem_jax.errors import unknown

RECIPES = ("demo",)
"""Names of the recipes: modules of this package with a `get_config()`."""


def recipe(name: str) -> RunConfig:
    """Returns the run config of a name in `RECIPES`.

    Raises:
        UserError: unknown name; the message names the nearest one and lists all.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    config: RunConfig = importlib.import_module(f"{__name__}.{name}").get_config()
    return config
