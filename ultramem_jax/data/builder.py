"""Builds a corpus: tokenizes it once, into a folder of the cache.

The documents of a split, each followed by one end-of-document token, form one stream of tokens. A tokenizer
of another model may also have a token that begins each of them. Streams do not depend on sequences, so one
build serves every seq_len.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ultramem_jax.config import DataConfig
from ultramem_jax.data.sources import SPLITS, CorpusHash, Source, open_source
from ultramem_jax.data.token_files import (
    Description,
    append_tokens,
    made_again,
    read_description,
    tokens_path,
    write_description,
)
from ultramem_jax.data.tokenizer_files import ALLOWED, open_tokenizer
from ultramem_jax.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer
from ultramem_jax.errors import UserError, require
from ultramem_jax.files import cache_folder, locked, sync_folder

_FORMAT = 2
"""Format of the cache. It is raised when the contents of the cache change their meaning."""


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None) -> Path:
    """Returns the folder of the tokenized corpus, and builds it first if it is not in the cache.

    The folder gets its name by a rename when it is whole and on disk, so a folder of that name is always
    whole, also after a loss of power. A lock lets one process of a machine build while the others wait. The
    next process removes what a killed one left behind.

    Args:
        config: describes the corpus.
        tokenizer: the tokenizer of a file, for a `config.tokenizer` that names one; None opens it.

    Raises:
        UserError: see `open_source`, and `open_tokenizer` for that of a file; a cache folder that cannot be
            written; an empty training split for `bpe`.
    """
    if tokenizer is None:
        tokenizer = file_tokenizer(config)
    source = open_source(config)
    survey = source.survey()
    require(survey.num_bytes != 0, "data.path", config.path, "must hold some text; all documents are empty")
    kind = config.tokenizer if tokenizer is None else "file"
    settings = {
        "format": _FORMAT,
        "corpus": survey.key,
        "tokenizer": kind,
        "bpe_vocab_size": config.bpe_vocab_size if kind == "bpe" else None,
    }
    if tokenizer is not None:
        settings["tokenizer_hash"] = tokenizer.fingerprint
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    label = re.sub(r"\W+", "_", config.dataset)
    folder = cache_root(config) / f"{label}-{kind}-{key[:16]}"
    if folder.exists():
        return folder
    try:
        with locked(folder.with_suffix(".lock")):
            if not folder.exists():
                incomplete = folder.with_suffix(".incomplete")
                shutil.rmtree(incomplete, ignore_errors=True)
                incomplete.mkdir()
                try:
                    _build(config, tokenizer, source, survey.num_bytes, incomplete)
                    sync_folder(incomplete)
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
    return Path(config.cache_dir).expanduser() if config.cache_dir else cache_folder()


def file_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Returns the tokenizer of the file that `config.tokenizer` names, or None if it names no file.

    Raises:
        UserError: there is no such file; see `open_tokenizer`.
    """
    if config.tokenizer in ("bytes", "bpe"):
        return None
    there = Path(config.tokenizer).expanduser().exists()
    require(there, "data.tokenizer", config.tokenizer, f"no such file; must be 'bytes', 'bpe', {ALLOWED}")
    return open_tokenizer(config.tokenizer)


def load_tokenizer(config: DataConfig, folder: Path) -> Tokenizer:
    """Returns the tokenizer that the corpus in `folder` was made with.

    Raises:
        UserError: the folder's `tokenizer.json` is damaged, or is not the tokenizer of its tokens; for a
            tokenizer of a file see `file_tokenizer`.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    of_file = file_tokenizer(config)
    if of_file is not None:
        return of_file
    path = folder / "tokenizer.json"
    again = made_again(folder)
    try:
        tokenizer = BpeTokenizer.load(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    if tokenizer.fingerprint != read_description(folder)["tokenizer_hash"]:
        raise UserError(f"{path}: must be the tokenizer that the tokens beside it were made with; {again}")
    return tokenizer


def _build(
    config: DataConfig, tokenizer: Tokenizer | None, source: Source, num_bytes: int | None, folder: Path
) -> None:
    """Writes the tokens of `source` into `folder`, and the tokenizer if it is trained here."""
    if tokenizer is None:
        trained = config.tokenizer == "bpe"
        tokenizer = _train_bpe(source, config.bpe_vocab_size, folder) if trained else ByteTokenizer()
    write_description(folder, _tokenize(config.dataset, source, tokenizer, num_bytes, folder))


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
    dataset: str, source: Source, tokenizer: Tokenizer, num_bytes: int | None, folder: Path
) -> Description:
    """Writes the stream of tokens of each split, and returns their description."""
    corpus_hash = CorpusHash()
    # The end of the document before stands for the beginning where the tokenizer has no token for it.
    before = np.array([i for i in tokenizer.start_ids if i != tokenizer.eos_id], np.int32)
    end = np.array([tokenizer.eos_id], np.int32)
    tokens, text, documents = (dict.fromkeys(SPLITS, 0) for _ in range(3))
    with _progress(f"tokenizing {dataset}", num_bytes) as bar:
        for split in SPLITS:
            with open(tokens_path(folder, split), "wb") as file:
                for document in source.documents(split):
                    corpus_hash.update(split, document)
                    ids = np.concatenate([before, tokenizer.encode(document.data), end])
                    append_tokens(file, ids, tokenizer.vocab_size)
                    tokens[split] += len(ids)
                    text[split] += len(document.data)
                    documents[split] += 1
                    bar.update(len(document.data))
    return Description(
        corpus_hash=corpus_hash.hexdigest(),
        dataset=dataset,
        tokenizer=tokenizer.name,
        tokenizer_hash=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        num_tokens=tokens,
        num_bytes=text,
        num_documents=documents,
    )


def _progress(what: str, num_bytes: int | None) -> tqdm:
    return tqdm(desc=what, total=num_bytes, unit="B", unit_scale=True, file=sys.stderr)
