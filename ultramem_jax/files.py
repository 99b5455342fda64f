"""Files that appear whole or not at all."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one motion, as UTF-8: if the process ends, there is the old one or the new one.

    One writer at a time is the caller's to see to.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
