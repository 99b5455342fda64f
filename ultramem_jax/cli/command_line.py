"""Parses the command line that all commands share, and runs a command with one-line errors.

Every command, experiments included, is a module with absl flags and a `main()`. The config of a run is built
in this order, whatever the order of the flags:

1. `--config=FILE`: a Python file with `get_config() -> RunConfig`, or the name of a recipe.
2. `--preset=NAME`: replaces the model.
3. Flags of the command's own (`ConfigFlag`), in the order in which it lists them.
4. `--mesh=AXIS:SIZE,...`: sets the sizes of the mesh axes.
5. `--config.part.field=value`: overrides single fields.
"""

import contextlib
import inspect
import logging
import os
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags as ml_config_flags

from ultramem_jax.cli.arguments import HELP, take, take_integer
from ultramem_jax.cli.config_help import fields_help, presets_help, wrapped
from ultramem_jax.cli.plain_log import plain_log
from ultramem_jax.config import RunConfig, run_config_from_dict, to_dict
from ultramem_jax.errors import Stopped, UserError, one_line, unknown, whole_number
from ultramem_jax.parallel import distributed
from ultramem_jax.parallel.distributed import HEARTBEAT_TIMEOUT, INITIALIZATION_TIMEOUT, Membership
from ultramem_jax.parallel.mesh import AXES
from ultramem_jax.presets import preset
from ultramem_jax.recipes import RECIPES, recipe
from ultramem_jax.tree_types import JsonDict

FLAGS = flags.FLAGS

_CONFIG_HELP = (
    f"--config={'|'.join(RECIPES)}: a run that comes with the library; or --config=FILE: a Python file with "
    "get_config() -> RunConfig; the file is executed, so use only files that you trust",
    "--preset=NAME: the model, one of the presets below",
    "--config.part.field=value: sets one of the fields below, explained in ultramem_jax.config and, "
    "for kinds of memories, in ultramem_jax.layers.memory; --config.model.memory.top_m=8 is short for "
    "--config.model.memories.NAME.address.top_m=8 if the model has one memory",
)
_MESH_HELP = (
    "--mesh=AXIS:SIZE,...: the number of devices along each mesh axis, of "
    f"{', '.join(AXES)}; an axis that is not named has 1; data:0 takes all devices that the others leave"
)
_PROCESSES_HELP = (
    "--processes=N: runs in N processes of this machine; on CPUs each process has its own devices, GPUs must "
    "be distributed by you (CUDA_VISIBLE_DEVICES)",
    "--coordinator_address=HOST:PORT --num_processes=N --process_id=I: runs as process I of N processes on "
    "several machines, each of which runs this command; the address is an address of process 0",
    "--coordinator_address=auto: the same, read from the cluster's environment (SLURM, Open MPI, TPU pod)",
    "--initialization_timeout=SECONDS: time to wait for the other processes "
    f"(default {INITIALIZATION_TIMEOUT})",
    "--heartbeat_timeout=SECONDS: time without a heartbeat after which a process counts as dead and all "
    f"processes end (default {HEARTBEAT_TIMEOUT})",
)
_OF_ONE_MEMORY = re.compile(r"(--?(?:no)?)config\.model\.memory\.([^=]+)((?:=.*)?)")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=.*)?")


class ConfigFlag(NamedTuple):
    """Describes a flag of a command that changes its config before single fields are overridden."""

    name: str
    help: str
    """Text of `--help`, which begins with the flag."""
    apply: Callable[[JsonDict, str], None]
    """Changes the config, a nested dict, by the value of the flag."""


def run(
    main: Callable[[], None],
    argv: list[str],
    usage: str,
    base: RunConfig | None = None,
    together: bool = False,
    config_flags: Sequence[ConfigFlag] = (),
) -> int:
    """Parses flags, runs a command and returns the exit status.

    A process that has joined others does not return after a failure: it ends at once.

    Args:
        main: the command's function; it reads `FLAGS` and gets its config from `run_config`.
        argv: program and name of the command in one string, then the flags.
        usage: text that `--help` prints above the flags.
        base: config that `--config` and `--preset` change; None if the command has none.
        together: whether the command can run in several processes. It then takes the flags that say which
            process this one is.
        config_flags: flags of the command that change `base`.

    Returns:
        0 if all went well; 2 after an error of the user's or a file that the system refuses (with one line on
        standard error); 75 if SIGTERM stopped work that the same command resumes; 130 after an interrupt.
    """
    global _program
    _program = argv[0].rpartition(" ")[0]
    with plain_log() as logger:
        try:
            if base is not None:
                argv = _define_config(argv, base, config_flags)
            if any(flag in HELP for flag in argv[1:]):
                print(f"{usage}\n\n{_flag_help(main.__module__, base, together, config_flags)}")
                return 0
            member = None
            if together:
                member, argv = _take_membership(argv)
            _parse(argv)
            with _joined(member, logger):
                main()
        except (UserError, flags.Error) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            status = 2
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            status = 2
        except Stopped as stopped:
            print(stopped)  # an orderly end: all of several processes reach this line
            return Stopped.STATUS
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
        except Exception:
            if not distributed.is_joined():
                raise
            traceback.print_exc()
            status = 1
        else:
            return 0
    if distributed.is_joined():
        distributed.end_at_once(status)
    return status


def run_config() -> RunConfig:
    """Returns the config that this command line describes.

    Raises:
        UserError: a value that is not allowed.
    """
    return run_config_from_dict(FLAGS.config.to_dict())


def program() -> str:
    """Returns the words before the name of the command, for hints about what to run next."""
    return _program


def config_name() -> str:
    """Returns the name of the preset or of the config file, which is the default name of the run's folder."""
    return _name


def config_file() -> pathlib.Path | None:
    """Returns the path that `--config` gave; None if the flag is absent."""
    return _file


def config_flag(name: str) -> str | None:
    """Returns the value that the command line gave to a `ConfigFlag`; None if the flag is absent."""
    return _given.get(name)


_program = "ultramem"
_name = "run"
_file: pathlib.Path | None = None
_given: dict[str, str] = {}


def _parse(argv: list[str]) -> None:
    with _sys_argv(argv):
        rest = FLAGS(argv)[1:]
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")


def _define_config(argv: list[str], base: RunConfig, own: Sequence[ConfigFlag]) -> list[str]:
    """Defines the flag `config` from the flags that make it; returns the command line without those flags."""
    global _name, _file
    _given.clear()
    tree = to_dict(base)
    file, rest = take(argv, "config")
    preset_name, rest = take(rest, "preset")
    mesh, rest = take(rest, "mesh")
    _file = None if file is None else pathlib.Path(file)
    if file is not None:
        tree = to_dict(_read_config(file))
        _name = pathlib.Path(file).stem
    if preset_name is not None:
        tree["model"] = to_dict(preset(preset_name))
        _name = preset_name
    for flag in own:
        value, rest = take(rest, flag.name)
        if value is not None:
            _given[flag.name] = value
            flag.apply(tree, value)
    if mesh is not None:
        tree["mesh"] |= _mesh(mesh)
    rest = [_spelled_out(argument, tree) for argument in rest]
    for argument in rest:
        if match := _OVERRIDE.fullmatch(argument):
            _check_key(tree, match[1])
    with _sys_argv(rest):
        ml_config_flags.DEFINE_config_dict("config", ConfigDict(tree), "the run; --config.part.field=value")
    return rest


def _spelled_out(argument: str, tree: JsonDict) -> str:
    """Writes `--config.model.memory.top_m=8`, an override of the only memory, with the field's full name.

    Raises:
        UserError: the model has several memories or none, or the memory has no such field.
    """
    match = _OF_ONE_MEMORY.fullmatch(argument)
    if match is None:
        return argument
    memories = tree["model"]["memories"]
    if len(memories) != 1:
        has = f"has {', '.join(memories)}" if memories else "has none"
        raise UserError(f"{argument}: must be of the one memory of a model, and this one {has}")
    ((name, memory),) = memories.items()
    field, *inner = match[2].split(".")
    if field not in memory:
        parts = [part for part, fields in memory.items() if isinstance(fields, dict) and field in fields]
        if not parts:
            known = set(memory).union(*(fields for fields in memory.values() if isinstance(fields, dict)))
            raise unknown(f"config key 'model.memory.{match[2]}':", field, known - {"kind"})
        field = f"{parts[0]}.{field}"
    path = ".".join(["model.memories", name, field, *inner])
    return f"{match[1]}config.{path}{match[3]}"


def _mesh(text: str) -> dict[str, int]:
    """Returns the axis sizes that `--mesh=data:4,memory:2` gives; axes that it does not name have size 1."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition(":")
        if name not in AXES:
            raise unknown(f"axis in --mesh = {text!r}:", name, AXES)
        number = whole_number(size)
        if number is None or name in sizes:
            allowed = f"must be AXIS:SIZE,... of the axes {', '.join(AXES)}, each once"
            raise UserError(f"--mesh = {text!r}: {allowed}")
        sizes[name] = number
    return dict.fromkeys(AXES, 1) | sizes


def _take_membership(argv: list[str]) -> tuple[Membership | None, list[str]]:
    """Returns the membership of this process in a group, if any, and the remaining command line."""
    address, argv = take(argv, "coordinator_address")
    given: dict[str, int] = {}
    for flag in ("num_processes", "process_id", "initialization_timeout", "heartbeat_timeout"):
        value, argv = take_integer(argv, flag)
        if value is not None:
            given[flag] = value
    if address is not None:
        return Membership(address, **given), argv
    for flag, value in given.items():
        raise UserError(f"--coordinator_address: must be given with --{flag} = {value}")
    return None, argv


@contextlib.contextmanager
def _sys_argv(argv: list[str]) -> Iterator[None]:
    """Replaces `sys.argv` while the block runs.

    ml_collections reads its overrides from `sys.argv`, even if another list is parsed.
    """
    real, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = real


def _read_config(path: str) -> RunConfig:
    if path in RECIPES:
        return recipe(path)
    if not pathlib.Path(path).is_file():
        files = [file.as_posix() for file in pathlib.Path(path).parent.glob("[!_]*.py")]
        raise unknown("config file or recipe", path, [*RECIPES, *files])
    try:
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config) or not _takes_nothing(get_config):
            raise UserError(
                f"--config = {path!r}: must define get_config(), a function that takes no arguments and "
                "returns a RunConfig"
            )
        config = get_config()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        # A Python file can raise anything. The user has to fix it, so one line reports it as a user error.
        raise UserError(f"--config = {path!r}: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise UserError(f"--config = {path!r}: get_config() must return a RunConfig, not {config!r}")
    return config


def _takes_nothing(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _check_key(tree: JsonDict, key: str) -> None:
    """Raises a `UserError` for an override of an unknown field, before ml_collections reports it."""
    node: object = tree
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


def _flag_help(
    module: str, base: RunConfig | None, together: bool, config_flags: Sequence[ConfigFlag]
) -> str:
    entries: list[str] = []
    own_models = hasattr(sys.modules[module], "CONFIG_HELP")
    if base is not None:
        # A command that chooses its own models describes what its --config takes.
        entries += getattr(sys.modules[module], "CONFIG_HELP", _CONFIG_HELP)
        entries += [flag.help for flag in config_flags]
        entries.append(_MESH_HELP)
    if together:
        entries += _PROCESSES_HELP
    modules = (module, *getattr(sys.modules[module], "FLAG_MODULES", ()))
    own = [flag for one in modules for flag in FLAGS.flags_by_module_dict().get(one, [])]
    entries += [f"--{flag.name}: {flag.help} (default {flag.default!r})" for flag in own]
    lines = [line for entry in entries for line in wrapped(entry)]
    if base is not None:
        presets = [] if own_models else ["", "Presets:", *presets_help()]
        fields = fields_help(base, with_model=not own_models)
        lines += [*presets, "", "Fields, with their values here:", *fields]
    return "\n".join(lines)


@contextlib.contextmanager
def _joined(member: Membership | None, logger: logging.Logger) -> Iterator[None]:
    """Joins the other processes, if any, while the block runs, and silences all processes but the first."""
    if member is not None:
        distributed.join(member)
    if member is None or distributed.is_first():
        yield
        return
    logger.setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
