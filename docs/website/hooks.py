"""Chooses the pages of the documentation site; MkDocs calls the functions by their names.

The site has the paths of the repository, so that links between README, documents and results hold in both.
Links to modules of the library lead to the API reference, and any other file that a page links to is copied.
"""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "ultramem_jax"
_LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds what grows with the repository to the navigation: results, API reference, and the rest."""
    config.nav.append({"Results": [_name(path) for path in _results()]})
    config.nav.append({"API reference": list(_reference())})
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        if (ROOT / name).exists():
            config.nav.append(name)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Returns the theme's files, the documents under their paths in the repository, and the reference."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *_results()]
    paths = {*documents, *ROOT.glob("docs/website/*.css")}
    for document in documents:
        linked = {(document.parent / match[2]).resolve() for match in _LINK.finditer(document.read_text())}
        paths |= {path for path in linked if path.is_file() and PACKAGE not in path.parents}
    kept = Files([file for file in files if file.src_dir != config.docs_dir])
    for path in sorted(paths):
        kept.append(_generated(config, _name(path), abs_src_path=str(path)))
    for name, text in _reference().items():
        kept.append(_generated(config, name, content=text))
    return kept


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to the library's modules into cross-references, and links to other folders into text."""
    folder = (ROOT / page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if PACKAGE in (target, *target.parents) and target.exists():
            return f"[{match[1]}][{_module(target)}]"
        return match[1] if target.is_dir() else match[0]

    return _LINK.sub(replaced, markdown)


def _results() -> list[pathlib.Path]:
    return sorted((ROOT / "experiments" / "results").rglob("*.md"))


def _reference() -> dict[str, str]:
    """Returns the pages of the API reference by their names: the package's, then one for every room."""
    modules = [_module(path) for path in sorted(PACKAGE.glob("*.py")) if not path.stem.startswith("__")]
    listed = "".join(f"\n::: {module}\n" for module in modules)
    alone = "    options:\n      show_submodules: false\n"
    pages = {"api/ultramem_jax.md": f"# ultramem_jax\n\n::: ultramem_jax\n{alone}{listed}"}
    for room in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        name = _module(room)
        pages[f"api/{room.name}.md"] = f"# {name}\n\n::: {name}\n"
    return pages


def _module(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _generated(config: MkDocsConfig, name: str, **source: str) -> File:
    return File.generated(config, name, inclusion=InclusionLevel.INCLUDED, **source)
