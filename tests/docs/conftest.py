"""Runs programs in this process, for tests of commands that documents name."""

from tests.support.programs import run

__all__ = ["run"]
