"""The command line that all experiments share: `--config`, `--preset`, overrides, and one-line errors.

Every experiment is a module with absl flags and a `main()`. A run's config starts from `--config=FILE` (a
Python file with `get_config() -> RunConfig`), takes its model from `--preset=NAME`, and then the overrides
`--config.part.field=value`, whatever their order on the command line.
"""

import contextlib
import logging
import pathlib
import re
import runpy
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

_CONFIG_HELP = (
    "--config=FILE: a Python file with get_config() -> RunConfig, as in experiments/configs/",
    "--preset=NAME: the model, one of `python launch.py count`",
    "--config.part.field=value: any field of ultramem_jax/config.py or memory_config.py",
)
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
    with _plain_log():
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


def config_file() -> pathlib.Path | None:
    """The file of `--config`; None if it was not given."""
    return _file


_name = "run"
_file: pathlib.Path | None = None


def _parse(argv: list[str]) -> None:
    with _sys_argv(argv):
        rest = FLAGS(argv)[1:]
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")


def _define_config(argv: list[str], base: RunConfig) -> list[str]:
    """Defines the flag `config` from file and preset; returns the command line without those two."""
    global _name, _file
    tree = to_dict(base)
    file, rest = _take(argv, "config")
    preset_name, rest = _take(rest, "preset")
    _file = None if file is None else pathlib.Path(file)
    if file is not None:
        tree = to_dict(_read_config(file))
        _name = pathlib.Path(file).stem
    if preset_name is not None:
        tree["model"] = to_dict(preset(preset_name))
        _name = preset_name
    for argument in rest:
        if match := _OVERRIDE.fullmatch(argument):
            _check_key(tree, match[1])
    with _sys_argv(rest):
        config_flags.DEFINE_config_dict("config", ConfigDict(tree), "the run; --config.part.field=value")
    return rest


def _take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `--flag=value` or `--flag value`, the last one if there are several, and the rest."""
    value, rest, position = None, [], 0
    while position < len(argv):
        name, equals, given = argv[position].partition("=")
        if name not in (f"--{flag}", f"-{flag}"):
            rest.append(argv[position])
        elif equals:
            value = given
        elif position + 1 < len(argv):
            position += 1
            value = argv[position]
        else:
            raise UserError(f"--{flag}: needs a value, --{flag}=VALUE")
        position += 1
    return value, rest


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
        folder = pathlib.Path(__file__).parent / "configs"
        known = [f"experiments/configs/{file.name}" for file in folder.glob("[!_]*.py")]
        raise unknown("config file", path, known)
    try:
        config = runpy.run_path(path)["get_config"]()
    except UserError:
        raise
    except Exception as error:
        # Whatever a file of Python can do wrong is the user's to mend, and one line says what it was.
        raise UserError(f"--config = {path!r}: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise UserError(f"--config = {path!r}: get_config() must return a RunConfig, not {config!r}")
    return config


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
        # An experiment that does not take them all says which it takes.
        lines = [f"  {line}" for line in getattr(sys.modules[module], "CONFIG_HELP", _CONFIG_HELP)]
    own = FLAGS.flags_by_module_dict().get(module, [])
    lines += [f"  --{flag.name}: {flag.help} (default {flag.default!r})" for flag in own]
    return "\n".join(lines)


@contextlib.contextmanager
def _plain_log() -> Iterator[None]:
    """Our own messages as plain lines on standard error, once; from the libraries, warnings alone."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logger = logging.getLogger("ultramem_jax")
    before = logger.level, logger.propagate
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Libraries give the root logger handlers of their own, which would print every line again.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
