"""Runs one command of the library or one experiment: `python launch.py <command> [flags]`.

Without arguments it lists all commands. With `--processes=N`, before or after the name of the command, it
runs the command in N processes of this machine.

    python launch.py train --config=demo
"""

import os
import sys

from experiments import EXPERIMENTS
from ultramem_jax.cli.huge_pages import use_huge_pages
from ultramem_jax.cli.launcher import launch
from ultramem_jax.commands import COMMANDS


def main(argv: list[str]) -> int:
    """Runs the command that `argv[1]` names and returns its exit status."""
    again = [sys.executable, os.path.abspath(__file__)]
    return launch(COMMANDS | EXPERIMENTS, argv[1:], "python launch.py", again)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv))
