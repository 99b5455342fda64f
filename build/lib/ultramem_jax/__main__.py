"""Runs the commands of the library: `ultramem`, or `python -m ultramem_jax`."""

import sys

from ultramem_jax.cli.huge_pages import use_huge_pages
from ultramem_jax.cli.launcher import launch
from ultramem_jax.commands import COMMANDS


def main() -> int:
    """Runs the command that the command line names and returns its exit status."""
    use_huge_pages()
    return launch(COMMANDS, sys.argv[1:], "ultramem", [sys.executable, "-m", "ultramem_jax"])


if __name__ == "__main__":
    sys.exit(main())
