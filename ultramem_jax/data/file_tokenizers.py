r"""Applies the tokenizers of other models, from a `tokenizer.json` or a GGUF file.

A text becomes the ids that the model's own tokenizer makes of it, except that special tokens come only if
they are asked for. Not every such tokenizer is lossless. Some normalise a text (NFC), some drop blanks or
unknown characters, some put a blank before a text unless it has one already, and some put one after each
added token. Byte counts are then those of the text that the ids stand for.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import processors

from ultramem_jax.data.byte_level import checked_ids, content_hash, library_errors, text_runs
from ultramem_jax.data.cutting import cut_places, pieces
from ultramem_jax.data.token_bytes import (
    Tree,
    byte_fallback_ids,
    bytes_of_tokens,
    without_prefix,
    without_special,
)
from ultramem_jax.errors import UserError
from ultramem_jax.files import replace_text

_PIECE_CHARACTERS = 1 << 16
"""Fewest characters of a piece into which a document is cut."""
_PIECES_PER_CALL = 64
"""Number of pieces encoded in parallel. The library needs about 100 bytes per token while it encodes."""


class FileTokenizer:
    """Applies a tokenizer of the library `tokenizers`, by Hugging Face, that another model was trained with.

    Bytes that are not UTF-8 become one token each where the vocabulary has tokens for bytes, else U+FFFD.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos_id: int, name: str, where: str):
        """Takes over a tokenizer, whose post-processor says what stands before a text.

        Args:
            backend: the tokenizer. It must not be used by itself afterwards.
            eos_id: id of the token that ends a document.
            name: a short name, for messages.
            where: the file that it comes from, for messages.

        Raises:
            UserError: the bytes of its tokens cannot be known, or it has no token `eos_id`.
        """
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, tokenizers.models.BPE):
            backend.model.dropout = None  # which would drop merges at random
        self.name, self.eos_id, self._where = name, eos_id, where
        id_of: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if eos_id not in id_of.values():
            raise UserError(f"{where}: end-of-document token = {eos_id}: there is no token with this id")
        self.vocab_size: int = max(id_of.values()) + 1
        # Without this, the written forms of special tokens in a document would encode to them.
        backend.encode_special_tokens = True
        self._backend, self._tree = backend, json.loads(backend.to_str())
        self._backends: dict[tuple[bool, bool], tokenizers.Tokenizer] = {}
        of_tokens = bytes_of_tokens(self._tree, id_of, where)
        added = {token["id"] for token in self._tree["added_tokens"] if token["special"]}
        self.special_ids = frozenset({eos_id, *added, *_unknown_id(self._tree, id_of)})
        self.start_ids = self._front() or (eos_id,)
        if without_special(self._tree, self.special_ids) is self._tree:
            self._backends[False, False] = backend
        self._bytes_of_id = [
            b"" if i in self.special_ids else of_tokens.get(i, b"") for i in range(self.vocab_size)
        ]
        self.id_bytes = np.array([len(data) for data in self._bytes_of_id], np.int32)
        self._without_prefix = without_prefix(self._tree)
        self._adds_prefix = self._without_prefix != self._tree
        blank = np.array([data.startswith(b" ") for data in self._bytes_of_id], np.int32)
        self.first_id_bytes = self.id_bytes - blank if self._adds_prefix else self.id_bytes
        of_byte = byte_fallback_ids(self._tree, id_of)
        self._id_of_byte = np.array([of_byte.get(byte, -1) for byte in range(256)], np.int32)
        self._cut_places = cut_places(self._tree, id_of)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns a hash of the whole tokenizer; see `Tokenizer.fingerprint`."""
        parts = [content_hash(self._backend), self.eos_id, self.start_ids]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`, and `tokenizer_config.json` with the end-of-document token, into a folder.

        `open_tokenizer` reads them again, and so do other programs.

        Raises:
            OSError: they cannot be written.
        """
        # The tokenizer comes last: where it is, both are.
        save_settings(folder, self._backend.id_to_token(self.eos_id) or "")
        replace_text(folder / "tokenizer.json", self._backend.to_str(pretty=True))

    def encode(self, data: bytes, special: bool = False) -> np.ndarray:
        """Returns the ids of a document; see `Tokenizer.encode`."""
        has_bytes = bool((self._id_of_byte[0x80:] >= 0).all())
        runs = text_runs(data if has_bytes else data.decode("utf-8", "replace").encode())
        ids: list[np.ndarray] = [np.empty(0, np.int32)]
        for number, run in enumerate(runs):
            if isinstance(run, bytes):
                ids.append(self._id_of_byte[np.frombuffer(run, np.uint8)])
            else:
                ids += self._ids_of_text(run, special, continuing=number > 0)
        return np.concatenate(ids)

    def decode(self, ids: Sequence[int] | np.ndarray, continuing: bool = False) -> bytes:
        """Returns the bytes of ids; see `Tokenizer.decode`."""
        array = checked_ids(ids, self.vocab_size)
        parts = [self._bytes_of_id[i] for i in array]
        if self._adds_prefix:
            ends = np.isin(array, [self.eos_id, *self.start_ids])
            for i in np.flatnonzero(np.append(not continuing, ends[:-1])) if len(array) else ():
                parts[i] = parts[i].removeprefix(b" ")
        return b"".join(parts)

    def _ids_of_text(self, text: str, special: bool, continuing: bool) -> Iterator[np.ndarray]:
        # Special tokens may take in white space around them; prompts are short anyway.
        parts = pieces(text, None if special else self._cut_places, _PIECE_CHARACTERS)
        while group := list(itertools.islice(parts, _PIECES_PER_CALL)):
            if not continuing:  # only the first piece of a document may get a blank
                yield from self._encoded(self._backend_for(special, False), group[:1])
                group, continuing = group[1:], True
            yield from self._encoded(self._backend_for(special, True), group)

    def _front(self) -> tuple[int, ...]:
        """Returns the ids that the tokenizer puts before a text."""
        for text in ("a", "0", " ", "\n"):  # a small vocabulary may have no token for some
            try:
                with library_errors(self._where):
                    encoding = self._backend.encode(text)
            except UserError:
                continue
            text_begins = next((i for i, added in enumerate(encoding.special_tokens_mask) if not added), None)
            if text_begins is not None:
                return tuple(encoding.ids[:text_begins])
        return ()

    def _encoded(self, backend: tokenizers.Tokenizer, texts: list[str]) -> list[np.ndarray]:
        """Returns the ids of texts.

        Raises:
            UserError: the library cannot encode them, as the file has no token for what is unknown.
        """
        with library_errors(f"{self._where}: cannot encode a text"):
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def _backend_for(self, special: bool, continuing: bool) -> tokenizers.Tokenizer:
        """Returns the tokenizer for texts with or without special tokens, and with or without text before.

        Both are settings of a tokenizer, so each case has its own, made when it is first needed.
        """
        case = special, continuing and self._adds_prefix
        if case not in self._backends:
            tree = self._without_prefix if case[1] else self._tree
            tree = tree if special else without_special(tree, self.special_ids)
            with library_errors(f"{self._where}: must be a tokenizer.json"):
                backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
            backend.encode_special_tokens = not special
            self._backends[case] = backend
        return self._backends[case]


def save_settings(folder: Path, eos_token: str) -> None:
    """Writes the `tokenizer_config.json` that says which token ends a document.

    It also names the class with which transformers reads a `tokenizer.json` as it is: by the type of a model,
    it would choose one that brings a pre-tokenizer of its own.

    Raises:
        OSError: it cannot be written.
    """
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
    replace_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1))


def starting_with(backend: tokenizers.Tokenizer, ids: Iterable[int]) -> None:
    """Makes a tokenizer put the tokens `ids` before a text, and nothing else around it."""
    names = {f"front{i}": i for i in ids}
    tokens = [{"id": name, "ids": [i], "tokens": [backend.id_to_token(i)]} for name, i in names.items()]
    backend.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B"], special_tokens=tokens
    )


def _unknown_id(tree: Tree, id_of: dict[str, int]) -> set[int]:
    """Returns the id that stands for unknown characters, if there is one."""
    model = tree["model"]
    unknown = id_of.get(model.get("unk_token") or "", model.get("unk_id"))
    return set() if unknown is None else {int(unknown)}
