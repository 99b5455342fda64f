"""Reads documents: this Python's own sources, enwik8, text files and folders, TFDS by name, or made-up facts.

A source yields the documents of each split in a fixed order. These rules decide the split:

- folders (`stdlib`, `text`): by a hash of each file's path relative to the folder, 90 / 5 / 5, so that a file
  stays in its split when other files are added or removed;
- single files (`enwik8`, `text`): contiguous, the first 90 %, the next 5 %, the rest;
- `tfds:NAME`: the splits that the dataset has; a missing validation or test split is the last part of
  `train`;
- `facts:PEOPLE`: the same people in other words, see `facts.Population.texts`.
"""

import contextlib
import difflib
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ultramem_jax.config import DataConfig
from ultramem_jax.data.facts import Population
from ultramem_jax.data.local_files import is_regular, other_than_text, read, regular_files
from ultramem_jax.errors import UserError, require, unknown

SPLITS = ("train", "validation", "test")
_TRAIN_PERCENT, _VALIDATION_PERCENT = 90, 5

ENWIK8_BYTES = 100_000_000
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"

_STDLIB_EXCLUDED = {"test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """Holds one document. Its `name` is unique within its split."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Survey:
    """Holds what is known of a source before it is tokenized."""

    key: str
    """Key of the documents. It changes whenever they change."""
    num_bytes: int | None
    """Bytes over all splits; None where counting would mean reading everything."""


class Source(Protocol):
    """Describes what the builder needs of a source."""

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the documents of one of `SPLITS`, always in the same order."""

    def survey(self) -> Survey:
        """Identifies the documents."""


class CorpusHash:
    """Computes the sha256 over split, name and bytes of every document, in order."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, split: str, document: Document) -> None:
        """Adds a document.

        Each part is preceded by its length, so that no two corpora give the same stream.
        """
        for part in (split.encode(), document.name.encode("utf-8", "surrogateescape"), document.data):
            self._sha256.update(len(part).to_bytes(8, "little"))
            self._sha256.update(part)

    def hexdigest(self) -> str:
        """Returns the hash as 64 hexadecimal digits."""
        return self._sha256.hexdigest()


def open_source(config: DataConfig) -> Source:
    """Returns the source that `config` names.

    Raises:
        UserError: an unknown dataset; a path that is missing, empty, unreadable or not what it is said to be;
            a TFDS dataset that cannot be obtained; people beyond the last one.
    """
    dataset, path = config.dataset, os.path.expanduser(config.path)
    if dataset == "stdlib":
        require(not path, "data.path", path, "must be empty with data.dataset = 'stdlib'")
        return stdlib_source()
    if dataset == "enwik8":
        return enwik8_source(path)
    if dataset == "text":
        return text_source(path)
    if dataset.startswith("tfds:"):
        return TfdsSource(dataset.removeprefix("tfds:"), path)
    if dataset.startswith("facts:"):
        require(not path, "data.path", path, f"must be empty with data.dataset = {dataset!r}")
        return FactsSource(dataset.removeprefix("facts:"))
    raise unknown("data.dataset", dataset, ("stdlib", "enwik8", "text", "tfds:NAME", "facts:FIRST-END"))


def split_of(name: str) -> str:
    """Returns the split of a file, from the sha256 of its relative path in POSIX form."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    if percent < _TRAIN_PERCENT:
        return "train"
    return "validation" if percent < _TRAIN_PERCENT + _VALIDATION_PERCENT else "test"


class _LocalSource:
    """Identifies a source by reading it in full. What is on disk now counts, not its time stamps."""

    def documents(self, split: str) -> Iterator[Document]:
        raise NotImplementedError

    def survey(self) -> Survey:
        corpus_hash, num_bytes = CorpusHash(), 0
        for split in SPLITS:
            for document in self.documents(split):
                corpus_hash.update(split, document)
                num_bytes += len(document.data)
        return Survey(corpus_hash.hexdigest(), num_bytes)


class FolderSource(_LocalSource):
    """Reads the files below `root`, one document each, named by their relative path."""

    def __init__(self, root: Path, files: Iterable[Path]):
        self._root = root
        self._names = sorted(path.relative_to(root).as_posix() for path in files)

    def documents(self, split: str) -> Iterator[Document]:
        """Yields documents in the order of their names; see `Source.documents`."""
        for name in self._names:
            if split_of(name) == split:
                yield Document(name, read(self._root / name))


class FileSource(_LocalSource):
    """Cuts one file into contiguous splits, one document each. An empty split has no document."""

    def __init__(self, name: str, path: Path):
        self._name = name
        self._path = path

    @cached_property
    def data(self) -> bytes:
        """Returns the bytes of the whole file, decompressed."""
        return read(self._path)

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the document of a split; see `Source.documents`."""
        size = len(self.data)
        train_end = size * _TRAIN_PERCENT // 100
        validation_end = size * (_TRAIN_PERCENT + _VALIDATION_PERCENT) // 100
        start, end = {
            "train": (0, train_end),
            "validation": (train_end, validation_end),
            "test": (validation_end, size),
        }[split]
        if end > start:
            yield Document(self._name, self.data[start:end])


def stdlib_source() -> FolderSource:
    """Returns the standard library of the running Python: its .py files, without tests and site-packages.

    Raises:
        UserError: this Python has no such files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        if is_regular(path) and _STDLIB_EXCLUDED.isdisjoint(path.relative_to(root).parts)
    ]
    if not files:
        raise UserError(f"data.dataset = 'stdlib': this Python has no .py sources under {root}; use 'text'")
    return FolderSource(root, files)


def enwik8_source(path: str) -> FileSource:
    """Returns the first 10^8 bytes of the English Wikipedia dump of 2006-03-03, split 90 M / 5 M / 5 M.

    Raises:
        UserError: the path does not name this file.
    """
    allowed = f"must name enwik8, plain or .gz: a file of {ENWIK8_BYTES:,} bytes with sha256 {ENWIK8_SHA256}"
    require(is_regular(path), "data.path", path, f"{allowed}; there is no such file")
    source = FileSource("enwik8", Path(path))
    # The size of a plain file is checked before reading, because it may be the whole dump.
    size = len(source.data) if path.endswith(".gz") else os.path.getsize(path)
    require(size == ENWIK8_BYTES, "data.path", path, f"{allowed}; this one has {size:,} bytes")
    digest = hashlib.sha256(source.data).hexdigest()
    require(digest == ENWIK8_SHA256, "data.path", path, f"{allowed}; this one has sha256 {digest}")
    return source


def text_source(path: str) -> FolderSource | FileSource:
    """Returns a file, or all text files below a folder except hidden ones. Files in .gz are decompressed.

    Raises:
        UserError: a path that is neither; a file that is not text; a folder without text, or without any for
            the training or the validation split.
    """
    allowed = "must name an existing file or folder of text"
    root = Path(path)
    # Path("") would be the working directory, which an empty field does not ask for.
    if path and os.path.isdir(path):
        files = [file for file in regular_files(root) if other_than_text(file) is None]
        require(bool(files), "data.path", path, f"{allowed}; there is no text in this folder")
        splits = {split_of(file.relative_to(root).as_posix()) for file in files}
        for split in ("train", "validation"):  # every run needs both; a test split is only evaluated
            if split not in splits:
                raise UserError(
                    f"data.path: no text of the folder {path!r} falls into its {split} split (a folder is "
                    f"split by the names of its files, here {len(files):,} of text); give more files, or one "
                    "file in place of a few"
                )
        return FolderSource(root, files)
    require(os.path.exists(path), "data.path", path, allowed)
    require(is_regular(path), "data.path", path, f"{allowed}; this is neither a regular file nor a folder")
    kind = other_than_text(root)
    require(kind is None, "data.path", path, f"{allowed}; this file is {kind}")
    return FileSource(root.name, root)


class FactsSource:
    """Makes biographies of people who do not exist, `FIRST-END[xCOPIES][@SEED]`; see `data.facts`."""

    def __init__(self, people: str):
        self._population = Population.parse(people)

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the documents of a split; see `Population.texts`."""
        for name, text in self._population.texts(split):
            yield Document(name, text.encode())

    def survey(self) -> Survey:
        """Identifies the documents by the people, since it is known what they say."""
        return Survey(self._population.key, None)


class TfdsSource:
    """Reads a text dataset of TensorFlow Datasets: `NAME[/config][:version]`, prepared or downloaded by TFDS.

    `data_dir` is TFDS's folder. Empty, it is TFDS's default ($TFDS_DATA_DIR, else ~/tensorflow_datasets). The
    text is the feature `text`, or else the only text feature of the dataset.
    """

    def __init__(self, name: str, data_dir: str = ""):
        self._name = name
        self._records = _tfds_records(name, data_dir)
        self._info = self._records["train"].dataset_info
        self._feature = _text_feature(name, self._info.features)

    def _range(self, split: str) -> tuple[Any, range]:
        """Returns the TFDS split that holds `split`, and the part of it that is meant."""
        missing = [name for name in SPLITS[1:] if name not in self._records]
        if split != "train" and split not in missing:
            return self._records[split], range(len(self._records[split]))
        train = self._records["train"]
        # If both are missing, train ends at 90 % and validation at 95 %. If one is, train ends at 95 %.
        left = [100 - _VALIDATION_PERCENT * k for k in range(len(missing), -1, -1)]
        ends = [0, *(len(train) * percent // 100 for percent in left)]
        part = ["train", *missing].index(split)
        return train, range(ends[part], ends[part + 1])

    def documents(self, split: str) -> Iterator[Document]:
        """Yields documents in the order of TFDS's records; see `Source.documents`."""
        records, indices = self._range(split)
        for i in indices:
            yield Document(str(i), records[i][self._feature])

    def survey(self) -> Survey:
        """Identifies the documents by TFDS's own description of the dataset.

        The dataset may be too large to be read for this.
        """
        splits = sorted((name, s.num_examples, s.num_bytes) for name, s in self._info.splits.items())
        account = repr((self._info.full_name, str(self._info.data_dir), self._feature, splits))
        return Survey(hashlib.sha256(account.encode()).hexdigest(), None)


def _tfds_records(name: str, data_dir: str) -> dict[str, Any]:
    """Returns TFDS split -> random-access records, and prepares them first if needed."""
    try:
        import tensorflow_datasets as tfds  # here, because no other source needs it
    except ImportError as error:
        needs = 'needs TensorFlow Datasets: pip install "ultramem_jax[tfds]"'
        raise UserError(f"data.dataset = {'tfds:' + name!r}: {needs} ({error})") from error

    where = data_dir or None
    allowed = "must name a text dataset that TFDS has prepared as array_record in data.path, or can download"
    try:
        # TFDS prints to stdout, which belongs to the program.
        with contextlib.redirect_stdout(sys.stderr):
            builder = tfds.builder(name, data_dir=where)
            if not builder.is_prepared():
                builder = tfds.builder(name, data_dir=where, file_format="array_record")
                builder.download_and_prepare()
            records = builder.as_data_source()
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(
            name, tfds.list_builders(with_community_datasets=False), n=1, cutoff=0.5
        )
        hint = f"did you mean {'tfds:' + near[0]!r}? " if near else ""
        raise UserError(f"unknown data.dataset {'tfds:' + name!r}: {hint}it {allowed}") from error
    except (
        Exception
    ) as error:  # downloads, parsers and missing packages of 1,000 datasets fail in any way they like
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"data.dataset = {'tfds:' + name!r}: {allowed}; {type(error).__name__}: {reason}"
        ) from error
    require(
        "train" in records, "data.dataset", f"tfds:{name}", f"must have a split 'train', has {list(records)}"
    )
    return dict(records)


def _text_feature(name: str, features: Any) -> str:
    """Returns the key of the text among the features of a TFDS dataset."""
    import tensorflow_datasets as tfds

    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if "text" in texts:
        return "text"
    require(len(texts) == 1, "data.dataset", f"tfds:{name}", f"must have one text feature, has {texts}")
    return texts[0]
