"""Reads code, commands and links of README and guides, for tests that try them."""

import pathlib
import re
import shlex

from tests.support.paths import ROOT

GUIDES = ROOT / "docs" / "guides"


def blocks(document: pathlib.Path, language: str) -> list[str]:
    """Returns the blocks of a language of a Markdown file, in its order."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def python_blocks(document: pathlib.Path) -> list[str]:
    """Returns the blocks of Python of a Markdown file, in its order."""
    return blocks(document, "python")


def write_files(document: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the Python files of a document: a first comment names the file, or the block continues it."""
    file = None
    for block in python_blocks(document):
        if named := re.match(r"# (\w+\.py)\n", block):
            file = folder / named[1]
            file.write_text(block)
        elif file:
            file.write_text(f"{file.read_text()}\n\n{block}")


def shell_commands(document: pathlib.Path) -> list[list[str]]:
    """Returns the words of every command in the `sh` blocks of a Markdown file, in its order."""
    lines = "".join(blocks(document, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def local_links(document: pathlib.Path) -> list[str]:
    """Returns the targets, without anchors, of a Markdown file's links that lead to other files."""
    return re.findall(r"\]\((?!http)([^)#]+)", document.read_text())
