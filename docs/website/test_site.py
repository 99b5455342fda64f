"""The site that `make docs` has built, as headless Chromium shows it. `make test` does not collect this."""

import html
import pathlib
import re
import shutil
import subprocess

import pytest

SITE = pathlib.Path(__file__).parents[2] / "site"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FETCHED = re.compile(r'\brel="?(?:stylesheet|preconnect)\b')
MEASURE = """<script>
addEventListener("load", () => document.querySelectorAll("article img").forEach(
    (image) => image.setAttribute("data-width", image.naturalWidth)))
</script></body>"""


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"no browser to open the site with: install one of {', '.join(BROWSERS)}", pytrace=False)
    return found


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A copy of the site whose pages write down how wide each picture is once it is shown."""
    copy = tmp_path_factory.mktemp("site") / "site"
    shutil.copytree(SITE, copy)
    for page in copy.rglob("*.html"):
        page.write_text(page.read_text().replace("</body>", MEASURE))
    return copy


@pytest.fixture
def opened(browser, site, tmp_path):
    """Returns a function from the name of a page to its document, after its scripts have run."""

    def opened(page):
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000")
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [browser, *options, profile, "--dump-dom", (site / page).as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return opened


def _title(document):
    return html.unescape(re.search(r"<title>(.*?)</title>", document)[1])


def _headings(document, level):
    found = re.findall(rf"<h{level}\b[^>]*>(.*?)<a class=\"headerlink\"", document, re.DOTALL)
    return [html.unescape(re.sub("<[^>]*>", "", heading)).strip() for heading in found]


def _widths(document):
    return [int(width) for width in re.findall(r'<img[^>]*data-width="(\d+)"', document)]


def test_the_home_page_is_the_readme(opened):
    document = opened("index.html")
    assert "ultramem_jax" in _title(document)
    assert _headings(document, 1) == ["ultramem_jax"]
    widths = _widths(document)
    assert widths and min(widths) > 100


def test_a_guide_has_its_steps(opened):
    document = opened("docs/guides/train_your_own_text.html")
    assert _title(document) == "Train on your own text - ultramem_jax"
    assert len(_headings(document, 2)) >= 4
    assert "ultramem" in document and "highlight" in document


def test_the_reference_has_functions_with_their_arguments(opened):
    document = opened("api/ops.html")
    assert 'id="ultramem_jax.ops.product_keys.retrieve_tucker"' in document
    entry = document.partition('id="ultramem_jax.ops.product_keys.retrieve_tucker"')[2][:20_000]
    assert "Parameters:" in entry and "Returns:" in entry


def test_results_come_with_their_figures(opened):
    pages = [page for page in sorted(SITE.glob("experiments/results/*/*.html")) if "<img" in page.read_text()]
    assert len(pages) >= 8
    for page in pages:
        widths = _widths(opened(page.relative_to(SITE)))
        assert widths and min(widths) > 100, page


def test_nothing_is_fetched_from_elsewhere():
    for page in SITE.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r'<(?:script|img)\b[^>]*src="(https?:[^"]*)', text)
        links = re.findall(r"<link\b[^>]*>", text)  # their attributes stand in any order
        fetched += [link for link in links if FETCHED.search(link) and 'href="http' in link]
        assert not fetched, page
