"""Builds a corpus that is tokenized once: a TFDS dataset of fixed-length records in the cache.

The documents of a split, each followed by one end-of-document token, form one stream of tokens. Record c
holds its tokens [c·C, (c+1)·C), with C = `RECORD_TOKENS`. The last record is padded with end-of-document
tokens that do not count. Records do not depend on sequences, so one build serves every seq_len.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from ultramem_jax.config import DataConfig
from ultramem_jax.data.sources import SPLITS, CorpusHash, Source, open_source
from ultramem_jax.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer
from ultramem_jax.errors import UserError, require

RECORD_TOKENS = 4096
"""C, tokens per record. A random sequence costs about 1 + S/C reads, and smaller records are no faster."""
_PART_BYTES = 1 << 28
"""Bytes of records in one TFDS split. TFDS holds them in memory while it writes, and beyond 1 GiB it needs
TensorFlow."""
_FORMAT = 1
"""Format of the cache. It is raised when the contents of the cache change their meaning."""


class Metadata(TypedDict):
    """Describes the records. It is stored beside them as JSON."""

    corpus_hash: str
    dataset: str
    tokenizer: str
    tokenizer_hash: str
    """The `Tokenizer.fingerprint`. Caches of older versions have none."""
    vocab_size: int
    record_tokens: int
    num_tokens: dict[str, int]
    """Tokens per split, end-of-document tokens included."""
    num_bytes: dict[str, int]
    """Bytes per split, only of the documents."""
    num_documents: dict[str, int]
    parts: dict[str, list[str]]
    """Names of the TFDS splits that hold the records of each split, in order."""


class PackedTokens(tfds.core.GeneratorBasedBuilder):
    """Writes array records {"tokens": (C,)} in stream order, as uint16, or int32 for more than 65,536 ids."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks for checksums of downloads beside the code. There are none, and the search needs the package
    # importlib_resources, which TFDS 4.9.10 imports without requiring it.
    code_path = None

    def __init__(self, *, data_dir: Path, streams: Mapping[str, np.ndarray], metadata: Metadata):
        self._streams = streams  # per split, (num_tokens,), usually memory-mapped
        self._metadata = metadata
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(
            shape=(RECORD_TOKENS,),
            dtype=_token_dtype(self._metadata["vocab_size"]),
            encoding=tfds.features.Encoding.BYTES,  # the default would store every id as a 64-bit varint
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documents as one stream of tokens per split, cut into records.",
            features=tfds.features.FeaturesDict({"tokens": tokens}),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        return {
            part: self._generate_examples(split, k)
            for split, parts in self._metadata["parts"].items()
            for k, part in enumerate(parts)
        }

    def _generate_examples(self, split: str, part: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        stream = self._streams[split]
        per_part = _records_per_part(stream.dtype)
        eos = self._metadata["vocab_size"] - 1  # any valid id would do: nothing reads the padding
        for c in range(part * per_part, min((part + 1) * per_part, _num_records(len(stream)))):
            tokens = np.full(RECORD_TOKENS, eos, stream.dtype)
            piece = stream[c * RECORD_TOKENS : (c + 1) * RECORD_TOKENS]
            tokens[: len(piece)] = piece
            yield c, {"tokens": tokens}


def prepare(config: DataConfig) -> Path:
    """Returns the folder of the tokenized corpus, and builds it first if it is not in the cache.

    The folder gets its name by a rename when it is whole, so a folder of that name is always whole. A lock
    lets one process of a machine build while the others wait. What a killed process left behind, the next one
    removes.

    Raises:
        UserError: see `open_source`; a cache folder that cannot be written; an empty training split for
            `bpe`.
    """
    source = open_source(config)
    survey = source.survey()
    require(survey.num_bytes != 0, "data.path", config.path, "must hold some text; all documents are empty")
    settings = {
        "format": _FORMAT,
        "corpus": survey.key,
        "tokenizer": config.tokenizer,
        "bpe_vocab_size": config.bpe_vocab_size if config.tokenizer == "bpe" else None,
        "record_tokens": RECORD_TOKENS,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    label = re.sub(r"\W+", "_", config.dataset)
    folder = cache_root(config) / f"{label}-{config.tokenizer}-{key[:16]}"
    if folder.exists():
        return folder
    try:
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                incomplete = folder.with_suffix(".incomplete")
                shutil.rmtree(incomplete, ignore_errors=True)
                incomplete.mkdir()
                try:
                    _build(config, source, survey.num_bytes, incomplete)
                    os.rename(incomplete, folder)
                finally:
                    shutil.rmtree(incomplete, ignore_errors=True)
    except OSError as error:
        where = str(cache_root(config))
        raise UserError(
            f"data.cache_dir = {where!r}: must be a folder that can be written: {error}"
        ) from error
    return folder


def cache_root(config: DataConfig) -> Path:
    """Returns `config.cache_dir`, else $ULTRAMEM_CACHE, else ~/.cache/ultramem_jax."""
    path = config.cache_dir or os.environ.get("ULTRAMEM_CACHE", "")
    return Path(path).expanduser() if path else Path.home() / ".cache" / "ultramem_jax"


def load_tokenizer(config: DataConfig, folder: Path) -> Tokenizer:
    """Returns the tokenizer that the corpus in `folder` was made with.

    Raises:
        UserError: the folder's `tokenizer.json` is damaged, or is not the tokenizer of its tokens.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    path = folder / "tokenizer.json"
    again = f"delete the folder {folder}, and it is made again"
    try:
        tokenizer = BpeTokenizer.load(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    expected = open_records(folder).info.metadata.get("tokenizer_hash", tokenizer.fingerprint)
    if tokenizer.fingerprint != expected:
        raise UserError(f"{path}: must be the tokenizer that the tokens beside it were made with; {again}")
    return tokenizer


def open_records(folder: Path) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder that reads what `prepare` wrote."""
    return tfds.builder_from_directory(folder / PackedTokens.name / str(PackedTokens.VERSION))


def _build(config: DataConfig, source: Source, num_bytes: int | None, folder: Path) -> None:
    """Writes the tokenizer and the records of `source` into `folder`."""
    tokenizer: Tokenizer = ByteTokenizer()
    if config.tokenizer == "bpe":
        tokenizer = _train_bpe(source, config.bpe_vocab_size, folder)
    spool = folder / "spool"
    spool.mkdir()
    metadata = _tokenize(config.dataset, source, tokenizer, num_bytes, spool)
    dtype = _token_dtype(tokenizer.vocab_size)
    streams = {split: np.memmap(spool / split, dtype, "r") for split in metadata["parts"]}
    with _quiet_tfds():
        PackedTokens(data_dir=folder, streams=streams, metadata=metadata).download_and_prepare()
    del streams
    shutil.rmtree(spool)
    shutil.rmtree(folder / "downloads", ignore_errors=True)  # TFDS creates this empty folder for downloads


def _train_bpe(source: Source, vocab_size: int, folder: Path) -> BpeTokenizer:
    def documents() -> Iterator[bytes]:
        with _progress("training the tokenizer", None) as bar:
            for document in source.documents("train"):
                yield document.data
                bar.update(len(document.data))

    if next(source.documents("train"), None) is None:
        raise UserError("data.tokenizer = 'bpe': must be 'bytes' for a corpus whose training split is empty")
    tokenizer = BpeTokenizer.train(documents(), vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    return tokenizer


def _tokenize(
    dataset: str, source: Source, tokenizer: Tokenizer, num_bytes: int | None, spool: Path
) -> Metadata:
    """Writes each split's stream of tokens to a raw file in `spool`. TFDS needs the lengths in advance."""
    dtype = _token_dtype(tokenizer.vocab_size)
    corpus_hash = CorpusHash()
    tokens, text, documents = (dict.fromkeys(SPLITS, 0) for _ in range(3))
    with _progress(f"tokenizing {dataset}", num_bytes) as bar:
        for split in SPLITS:
            with open(spool / split, "wb") as file:
                for document in source.documents(split):
                    corpus_hash.update(split, document)
                    ids = np.append(tokenizer.encode(document.data), np.int32(tokenizer.eos_id))
                    file.write(ids.astype(dtype).tobytes())
                    tokens[split] += len(ids)
                    text[split] += len(document.data)
                    documents[split] += 1
                    bar.update(len(document.data))
    per_part = _records_per_part(dtype)
    return Metadata(
        corpus_hash=corpus_hash.hexdigest(),
        dataset=dataset,
        tokenizer=tokenizer.name,
        tokenizer_hash=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        record_tokens=RECORD_TOKENS,
        num_tokens=tokens,
        num_bytes=text,
        num_documents=documents,
        parts={
            split: [f"{split}_{k:05}" for k in range(-(-_num_records(tokens[split]) // per_part))]
            for split in SPLITS
            if tokens[split]
        },
    )


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def _num_records(num_tokens: int) -> int:
    return -(-num_tokens // RECORD_TOKENS)


def _records_per_part(dtype: np.dtype) -> int:
    return _PART_BYTES // (RECORD_TOKENS * dtype.itemsize)


def _progress(what: str, num_bytes: int | None) -> tqdm:
    return tqdm(desc=what, total=num_bytes, unit="B", unit_scale=True, file=sys.stderr)


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from printing and from drawing its own progress bars."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        tfds.disable_progress_bar()
        try:
            yield
        finally:
            tfds.enable_progress_bar()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`. The system takes it back if this process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
