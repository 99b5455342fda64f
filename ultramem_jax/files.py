"""Files that appear whole or not at all."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one motion: whatever happens, there is the old one or the new one, as UTF-8."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
