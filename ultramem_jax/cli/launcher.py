"""Runs one of several commands by its name: what `ultramem` and `python launch.py` have in common."""

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ultramem_jax
from ultramem_jax.cli import local_processes
from ultramem_jax.cli.arguments import HELP
from ultramem_jax.errors import UserError, require, unknown


@dataclass(frozen=True)
class Command:
    """Describes a command: a module with a `main()`, and flags.

    If it takes `--config`, it also has a `BASE_CONFIG`, and it may have `CONFIG_FLAGS`, each a
    `command_line.ConfigFlag`. `FLAG_MODULES` names other modules that define flags of it.
    """

    module: str
    """Dotted name of the module; it is imported only when the command runs."""
    summary: str
    """One line for the list of commands."""
    in_several_processes: bool = False
    """Whether it takes `--processes=N`."""


def launch(
    commands: Mapping[str, Command], arguments: Sequence[str], program: str, again: Sequence[str]
) -> int:
    """Runs the command that the first argument names; without arguments, lists all commands.

    Args:
        commands: the commands by name.
        arguments: the command line without the program.
        program: what a user types to start it, for usage and hints.
        again: the words that start the same program, for `--processes`.

    Returns:
        The exit status: that of `command_line.run`, or 2 for an unknown command.
    """
    together = ", ".join(name for name, command in commands.items() if command.in_several_processes)
    try:
        processes, rest = local_processes.take_processes(list(arguments))
        if not rest or rest[0] in HELP:
            print(_overview(commands, program, together))
            return 0
        if rest[0] == "--version":
            print(version())
            return 0
        # After the overview, which needs no JAX.
        from ultramem_jax.cli import command_line

        name, *flags = rest
        if name not in commands:
            raise unknown("command", name, commands)
        command = commands[name]
        allowed = f"must be 1 for {name!r}; in several run {together}"
        require(processes == 1 or command.in_several_processes, "--processes", processes, allowed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if processes > 1 and not any(flag in HELP for flag in flags):
        return local_processes.run([*again, *rest], processes)
    module = importlib.import_module(command.module)
    base = getattr(module, "BASE_CONFIG", None)
    argv = [f"{program} {name}", *flags]
    own = getattr(module, "CONFIG_FLAGS", ())
    return command_line.run(module.main, argv, module.__doc__ or "", base, command.in_several_processes, own)


def version() -> str:
    """Returns the versions that a report of a problem should name, on one line."""
    packages = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy"))
    python = f"Python {platform.python_version()}"
    return f"ultramem_jax {ultramem_jax.__version__} ({packages}, {python}, {platform.system()})"


def _overview(commands: Mapping[str, Command], program: str, together: str) -> str:
    lines = [
        f"usage: {program} <command> [flags]     (--help after a command lists its flags)",
        f"       --processes=N runs {together} in N processes of this machine",
        "       --version names the versions that a report of a problem should name",
        "",
    ]
    return "\n".join([*lines, *(f"  {name:12} {command.summary}" for name, command in commands.items())])
