"""Runs programs in this process, for tests of commands that documents name."""

from tests.support.guides import folder
from tests.support.programs import run, text

__all__ = ["folder", "run", "text"]
