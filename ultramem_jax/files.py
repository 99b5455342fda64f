"""Files that appear whole or not at all."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one motion, as UTF-8: if the process ends, there is the old one or the new one.

    The caller must see that there is one writer at a time.

    Raises:
        OSError: the system refuses; it names the file, also where the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
