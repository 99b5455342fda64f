"""Optional packages that a test does without."""

import sys


def take_away(monkeypatch, package, *importers):
    """Makes a package, and the modules that import it, fail to import or be imported again."""
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    for importer in importers:
        monkeypatch.delitem(sys.modules, importer, raising=False)
        monkeypatch.delattr(importer, raising=False)
