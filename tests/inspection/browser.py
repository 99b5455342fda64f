"""Opens pages in headless Chromium, and says what their scripts have made of them."""

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=4000",
    "--window-size=1400,1000",
    "--dump-dom",
)
_BEFORE = """<script>
window.failures = [];
window.onerror = (message) => { window.failures.push(String(message)); };
document.addEventListener("securitypolicyviolation", (event) => {
  window.failures.push(event.violatedDirective);
});
</script>"""
_AFTER = """<script>
(() => {
  const found = {};
  try { (%s)(found); } catch (error) { window.failures.push(String(error)); }
  found.failures = window.failures;
  found.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  const results = document.createElement("pre");
  results.id = "results";
  results.textContent = JSON.stringify(found);
  document.body.append(results);
})();
</script>"""


@pytest.fixture(scope="session")
def visit(tmp_path_factory):
    """Returns a function (page, script) -> what the script, `(found) => {...}`, has put into `found`.

    Errors of the page are in `failures`, and what it has fetched is in `fetched`.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")

    def visit(page, script, address=""):
        folder = tmp_path_factory.mktemp("page")
        copy = page.replace("<head>", "<head>" + _BEFORE, 1)
        head, end, tail = copy.rpartition("</body>")
        (folder / "page.html").write_text(head + _AFTER % script + end + tail, encoding="utf-8")
        command = [browser, *_OPTIONS, f"--user-data-dir={folder / 'profile'}"]
        command.append((folder / "page.html").as_uri() + address)
        document = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        return json.loads(html.unescape(re.search(r'<pre id="results">(.*?)</pre>', document, re.DOTALL)[1]))

    return visit
