"""Begins the config and the variables of a run with another model, and adds memories to it."""

import logging
from collections.abc import Callable
from pathlib import Path

from ultramem_jax.cli.command_line import ConfigFlag, config_flag
from ultramem_jax.config import RunConfig, model_config_from_dict, to_dict
from ultramem_jax.errors import UserError
from ultramem_jax.interop import open_models
from ultramem_jax.presets.grafts import GRAFTS, graft
from ultramem_jax.training.initial import Initial
from ultramem_jax.training.restore import is_run, load_model, run_config, tokenizer_setting
from ultramem_jax.tree_types import JsonDict

log = logging.getLogger(__name__)

_INIT_FROM, _ADD_MEMORY = "init_from", "add_memory"


def _begin_with_model(tree: JsonDict, path: str) -> None:
    """Replaces the model, and the tokenizer if the model has one."""
    if is_run(path):
        run = run_config(path)
        tree["model"], tree["data"]["tokenizer"] = to_dict(run.model), tokenizer_setting(path, run.data)
        return
    tree["model"] = to_dict(open_models.read_config(path))
    tokenizer = open_models.tokenizer_of(path)
    if tokenizer is not None:
        tree["data"]["tokenizer"] = tokenizer
    else:
        log.warning("%s has no tokenizer: set data.tokenizer to that of its training", path)


def _add_memories(tree: JsonDict, names: str) -> None:
    """Adds memories by the names of their families.

    Raises:
        UserError: an unknown family, or a name that the model has already.
    """
    for name in names.split(","):
        model = model_config_from_dict(tree["model"])
        memory = graft(name, model)
        if name in model.memories:
            raise UserError(f"--{_ADD_MEMORY} = {names!r}: must name memories that the model does not have")
        tree["model"]["memories"][name] = to_dict(memory)


FLAGS = (
    ConfigFlag(
        _INIT_FROM,
        f"--{_INIT_FROM}=FOLDER|FILE.gguf: an open model, or the folder of another run, whose weights a new "
        "run begins with; its config replaces the model's, and its tokenizer becomes data.tokenizer",
        _begin_with_model,
    ),
    ConfigFlag(
        _ADD_MEMORY,
        f"--{_ADD_MEMORY}=NAME,...: adds memories to the model, of {', '.join(GRAFTS)}; with --{_INIT_FROM} "
        "they add nothing to its output at first, and then learn",
        _add_memories,
    ),
)
"""Flags of a command that begins a run."""


def initial_of_flags(config: RunConfig) -> Callable[[], Initial] | None:
    """Returns the function that loads what `--init_from` names; None without the flag.

    Args:
        config: the run's config, whose model may have more memories than the one that is loaded.
    """
    path = config_flag(_INIT_FROM)
    if path is None:
        return None

    def load() -> Initial:
        if is_run(path):
            run = load_model(path)
            theirs, variables = run.config.model, run.variables
        else:
            theirs, variables = open_models.load(Path(path))
        return Initial(
            variables, grafted=[name for name in config.model.memories if name not in theirs.memories]
        )

    return load
