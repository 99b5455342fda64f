"""Docstrings start with a sentence that stands by itself: its first word is a verb in the present tense."""

import ast
import re

import pytest

from tests.support.paths import ROOT

FILES = [*(ROOT / "ultramem_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py"), ROOT / "launch.py"]
VERB = re.compile(r"[A-Z][a-z]*s\b")
NO_VERBS = {"This", "Its", "Whether", "Parts", "Bytes", "Tokens", "Rows", "Numbers"}
DESCRIBED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_start_with_a_verb(path):
    for node in ast.walk(ast.parse(path.read_text())):
        docstring = ast.get_docstring(node) if isinstance(node, DESCRIBED) else None
        if docstring:
            first = docstring.split()[0]
            assert VERB.match(first) and first not in NO_VERBS, docstring.splitlines()[0]
