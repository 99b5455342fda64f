"""Versions are in one place, and what has to repeat one repeats it exactly."""

import re
import tomllib

import ultramem_jax
from tests.support.documents import ROOT


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ultramem_jax.__version__"}
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    written = [p for p in (ROOT / "ultramem_jax").rglob("*.py") if "__version__ = " in p.read_text()]
    assert written == [ROOT / "ultramem_jax" / "__init__.py"]


def test_the_changelog_begins_with_what_is_unreleased_and_this_version():
    entries = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[:2] == ["Unreleased", ultramem_jax.__version__]


def test_ruff_before_a_commit_is_that_of_make_lint():
    """A hook installs its own ruff, so its bounds are those of the development requirements."""
    hooks = re.findall(r'"(ruff[<>=].*?)"', (ROOT / ".pre-commit-config.yaml").read_text())
    files = [*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml"]
    wanted = {bound for path in files for bound in re.findall(r"ruff[<>=][\d.,<>=]*", path.read_text())}
    assert len(hooks) == 2 and set(hooks) == wanted


def test_an_issue_asks_for_the_versions():
    assert "ultramem --version" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text()


def test_the_workflow_calls_the_check_on_both_pythons():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: bash .ci/run" in workflow and '["3.11", "3.12"]' in workflow
