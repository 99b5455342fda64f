"""README, its siblings and docs/: links lead somewhere, and code and names exist."""

import re

import chex
import jax
import pytest

from tests.support.documents import ROOT, local_links, python_blocks

README = ROOT / "README.md"
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LINKS = sorted({(path, link) for path in DOCUMENTS for link in local_links(path)})
BLOCKS = python_blocks(README)


def test_the_library_example_runs():
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(BLOCKS[0], names)
    chex.assert_shape(names["logits"], (2, 64, 257))
    assert set(names["variables"]) == {"params", "memory", "buffers"}


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_architecture_is_short():
    assert len((ROOT / "docs" / "architecture.md").read_text().split()) < 3_170


@pytest.mark.parametrize(("path", "link"), LINKS, ids=[f"{path.name}-{link}" for path, link in LINKS])
def test_links_lead_somewhere(path, link):
    assert (path.parent / link).exists()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_anchors_are_headings(path):
    text = path.read_text()
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text):
        target = (path.parent / link) if link else path
        assert anchor in _anchors(target), f"{link}#{anchor}"


def _anchors(path):
    """Returns the anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_file_and_function_of_the_code_table_exists():
    table = README.read_text().split("## Where to find it in the code")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if "](ultramem_jax/" in line]
    assert len(rows) >= 6
    for row in rows:
        for path, name in re.findall(r"\]\((ultramem_jax/[^)]+)\)(?:: `(\w+)`)?", row):
            assert f"def {name}" in (ROOT / path).read_text() if name else (ROOT / path).exists()


def test_every_config_field_in_the_table_of_papers_exists():
    from ultramem_jax.presets import families

    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("| field of a memory") :].split("\n\n")[0]
    named = re.findall(r"`([a-z_]+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert len(named) >= 11 and all(families.ultramem().find(name) for name in named)
