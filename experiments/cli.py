"""The command line that all experiments share: `--config`, `--preset`, overrides, and one-line errors.

Every experiment is a module with absl flags and a `main()`. A run's config starts from `--config=FILE` (a
Python file with `get_config() -> RunConfig`), takes its model from `--preset=NAME`, and then the overrides
`--config.part.field=value`, whatever their order on the command line.
"""

import contextlib
import importlib.util
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from ultramem_jax.config import RunConfig, run_config_from_dict, to_dict
from ultramem_jax.errors import UserError, unknown
from ultramem_jax.presets import preset

FLAGS = flags.FLAGS

_CONFIG_FILE = re.compile(r"--?config=(.*)")
_PRESET = re.compile(r"--?preset=(.*)")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=.*)?")


def run(main: Callable[[], None], argv: list[str], usage: str, base: RunConfig | None = None) -> int:
    """Parses flags, runs an experiment and returns the exit status.

    Args:
        main: the experiment; reads `FLAGS` and, through `run_config`, its config.
        argv: program name and flags.
        usage: text of `--help`, above the flags.
        base: config that `--config` and `--preset` change; None if the experiment has none.

    Returns:
        0, 2 after an error of the user's (one line on standard error), or 130 after an interrupt.
    """
    _log_plainly()
    try:
        if base is not None:
            argv = _define_config(argv, base)
        if any(flag in ("--help", "-h", "-help") for flag in argv[1:]):
            print(f"{usage}\n\n{_flag_help(main.__module__, base is not None)}")
            return 0
        _parse(argv)
        main()
    except (UserError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run_config() -> RunConfig:
    """The config of this command line.

    Raises:
        UserError: a value that is not allowed.
    """
    return run_config_from_dict(FLAGS.config.to_dict())


def config_name() -> str:
    """The preset's or the config file's name: where a run is kept unless `--workdir` says otherwise."""
    return _name


_name = "run"


def _parse(argv: list[str]) -> None:
    with _sys_argv(argv):
        rest = FLAGS(argv)[1:]
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")


def _define_config(argv: list[str], base: RunConfig) -> list[str]:
    """Defines the flag `config` from file and preset; returns the command line without those two."""
    global _name
    tree, rest, preset_name = to_dict(base), [], None
    for argument in argv:
        if match := _CONFIG_FILE.fullmatch(argument):
            tree = to_dict(_read_config(match[1]))
            _name = pathlib.Path(match[1]).stem
        elif match := _PRESET.fullmatch(argument):
            preset_name = match[1]
        else:
            rest.append(argument)
    if preset_name is not None:
        tree["model"] = to_dict(preset(preset_name))
        _name = preset_name
    for argument in rest:
        if match := _OVERRIDE.fullmatch(argument):
            _check_key(tree, match[1])
    with _sys_argv(rest):
        config_flags.DEFINE_config_dict("config", ConfigDict(tree), "the run; --config.part.field=value")
    return rest


@contextlib.contextmanager
def _sys_argv(argv: list[str]) -> Iterator[None]:
    """ml_collections looks for its overrides in `sys.argv`, whatever list it is given to parse."""
    real, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = real


def _read_config(path: str) -> RunConfig:
    if not pathlib.Path(path).is_file():
        known = [str(p) for p in sorted(pathlib.Path("experiments/configs").glob("[!_]*.py"))]
        raise unknown("config file", path, known)
    spec = importlib.util.spec_from_file_location("run_config_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config = {path!r}: has no function get_config() -> RunConfig")
    return module.get_config()


def _check_key(tree: dict[str, Any], key: str) -> None:
    """Refuses an override of a field that does not exist, before ml_collections words it its own way."""
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        path = ".".join(parts[:depth])
        if node is None:
            raise UserError(f"--config.{key}: {path} is None in this config; choose a preset that has one")
        if not isinstance(node, dict):
            raise UserError(f"--config.{key}: {path} is a value and has no fields")
        if part not in node:
            raise unknown(f"config key {key!r}:", part, node)
        node = node[part]
    if isinstance(node, dict):
        raise UserError(f"--config.{key}: is a group of fields; set one of {', '.join(sorted(node))}")


def _flag_help(module: str, with_config: bool) -> str:
    lines = []
    if with_config:
        lines = [
            "  --config=FILE: a Python file with get_config() -> RunConfig, as in experiments/configs/",
            "  --preset=NAME: the model, one of `python launch.py count`",
            "  --config.part.field=value: any field of ultramem_jax/config.py",
        ]
    own = FLAGS.flags_by_module_dict().get(module, [])
    lines += [f"  --{flag.name}: {flag.help} (default {flag.default!r})" for flag in own]
    return "\n".join(lines)


def _log_plainly() -> None:
    """Our own messages as plain lines; from the libraries, warnings alone."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logger = logging.getLogger("ultramem_jax")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
