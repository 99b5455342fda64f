"""Turns bytes into token ids and back: raw bytes, or byte-pair encoding trained on the corpus.

Both are lossless for every byte string, text or not. Both have one end-of-document token, which no document
can produce by itself. `file_tokenizers` has a third kind, tokenizers of other models.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from ultramem_jax.data.byte_level import byte_characters, checked_ids, content_hash, read_backend, text_runs
from ultramem_jax.errors import UserError, require
from ultramem_jax.files import replace_text

EOS_TOKEN = "<|endoftext|>"
"""Written form of the end-of-document token in the JSON of a BPE tokenizer."""

_PIECE_BYTES = 1 << 16
"""Most bytes of a piece into which a document is cut (at a line end where there is one)."""
_PIECES_PER_CALL = 64
"""Number of pieces encoded in parallel. The library needs about 100 bytes per token while it encodes."""


class Tokenizer(Protocol):
    """Describes what the pipeline needs of a tokenizer."""

    @property
    def name(self) -> str:
        """Returns `bytes` or `bpe`, as in `DataConfig.tokenizer`, or a short name of the file."""

    @property
    def vocab_size(self) -> int:
        """Returns V, the largest id plus one, including the end-of-document token and other special ones."""

    @property
    def eos_id(self) -> int:
        """Returns the id of the end-of-document token."""

    @property
    def start_ids(self) -> tuple[int, ...]:
        """Returns the ids that stand before a document or a prompt, at least one.

        They are the tokens that the tokenizer itself puts in front of a text, such as Llama's BOS. Where it
        puts none, it is the end-of-document token, which is before each document of a corpus.
        """

    @property
    def special_ids(self) -> frozenset[int]:
        """Returns the ids of tokens that are not text, with the end-of-document token."""

    @property
    def id_bytes(self) -> np.ndarray:
        """Returns the bytes that each id stands for, (V,) int32; 0 for special tokens."""

    @property
    def first_id_bytes(self) -> np.ndarray:
        """Returns the bytes that each id stands for as the first of a document's text, (V,) int32.

        They are `id_bytes`, but one less where a tokenizer puts a blank before the text that the token
        contains.
        """

    @property
    def fingerprint(self) -> str:
        """Returns a hash of the map from bytes to ids, 64 hexadecimal digits; equal vocabularies have one."""

    def encode(self, data: bytes, special: bool = False) -> np.ndarray:
        """Returns the ids of one document, (num_tokens,) int32, without `start_ids` and `eos_id`.

        Args:
            data: the document.
            special: whether the written forms of special tokens, as chat templates have them, become their
                ids. Otherwise they are text like any other, and no text yields a special token.
        """

    def decode(self, ids: Sequence[int] | np.ndarray, continuing: bool = False) -> bytes:
        """Returns the bytes of `ids`. Special tokens yield nothing.

        Args:
            ids: ids in [0, V).
            continuing: whether other text precedes them. Otherwise they begin a document, and the blank that
                the tokenizer put before its text, if it puts one, is left out.

        Raises:
            ValueError: an id outside the vocabulary.
        """


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Refuses a tokenizer that makes ids which a model does not have.

    Args:
        tokenizer: the tokenizer.
        vocab_size: V of the model.
        where: what the tokenizer comes from, for the message.

    Raises:
        UserError: the tokenizer has more ids than the model.
    """
    allowed = f"must be at least the {tokenizer.vocab_size} ids of {where}, {tokenizer.name!r}"
    require(tokenizer.vocab_size <= vocab_size, "model.vocab_size", vocab_size, allowed)


class ByteTokenizer:
    """Makes one token of each byte: ids 0 to 255 are the bytes, and 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    eos_id = 256
    special_ids = frozenset({256})
    start_ids = (256,)
    id_bytes = first_id_bytes = np.append(np.ones(256, np.int32), np.int32(0))
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, data: bytes, special: bool = False) -> np.ndarray:
        """Returns the bytes as ids; see `Tokenizer.encode`. No special token has a written form.

        >>> ByteTokenizer().encode(b"hi").tolist()
        [104, 105]
        """
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, continuing: bool = False) -> bytes:
        """Returns the ids as bytes; see `Tokenizer.decode`.

        >>> ByteTokenizer().decode([104, 105, 256])
        b'hi'
        """
        array = checked_ids(ids, self.vocab_size)
        return array[array != self.eos_id].astype(np.uint8).tobytes()


class BpeTokenizer:
    """Applies byte-level byte-pair encoding (Radford et al. 2019, GPT-2), with the library `tokenizers`.

    The library is by Hugging Face. Valid UTF-8 is split by GPT-2's regular expression and merged. Bytes that
    are not UTF-8 become one token each. The vocabulary is smaller than asked for when the corpus has fewer
    pairs to merge.
    """

    name = "bpe"

    def __init__(self, backend: tokenizers.Tokenizer):
        # Without this, the written form of EOS_TOKEN in a document would encode to eos_id and lose text.
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        id_of = backend.get_vocab()
        self.eos_id: int = id_of[EOS_TOKEN]
        self.start_ids = (self.eos_id,)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset({self.eos_id, *(i for i, token in added.items() if token.special)})
        characters = byte_characters()
        byte_of = {character: byte for byte, character in characters.items()}
        self._bytes_of_id = [b""] * self.vocab_size
        for token, i in id_of.items():
            if i != self.eos_id:
                self._bytes_of_id[i] = bytes(byte_of[character] for character in token)
        self._id_of_byte = np.array([id_of[characters[byte]] for byte in range(256)], np.int32)
        self.id_bytes = self.first_id_bytes = np.array([len(data) for data in self._bytes_of_id], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns a hash of everything that decides which ids a text becomes; see `Tokenizer.fingerprint`."""
        return content_hash(self._backend)

    @classmethod
    def train(cls, documents: Iterable[bytes], vocab_size: int) -> "BpeTokenizer":
        """Learns merges from `documents`. `vocab_size` counts the 256 bytes and the end-of-document token."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        runs = (run for data in documents for run in _runs(data))
        backend.train_from_iterator((run for run in runs if isinstance(run, str)), trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "BpeTokenizer":
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it holds no byte-level BPE tokenizer with `EOS_TOKEN`.
        """
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: must be a file, the tokenizer of byte-level BPE")
        allowed = "must be a tokenizer of byte-level BPE"
        backend = read_backend(path, allowed)
        try:
            return cls(backend)
        except LookupError as error:
            raise UserError(f"{path}: {allowed}: {type(error).__name__}: {error}") from None

    def save(self, path: Path) -> None:
        """Writes the JSON of the `tokenizers` library. The file appears whole or not at all."""
        replace_text(path, self._backend.to_str(pretty=True))

    def encode(self, data: bytes, special: bool = False) -> np.ndarray:
        """Returns the ids of a document; see `Tokenizer.encode`."""
        if special:
            parts = data.split(EOS_TOKEN.encode())
            between = np.array([self.eos_id], np.int32)
            ends = [ids for part in parts for ids in (self.encode(part), between)]
            return np.concatenate(ends[:-1])
        ids: list[np.ndarray] = [np.empty(0, np.int32)]
        runs = _runs(data)
        while group := list(itertools.islice(runs, _PIECES_PER_CALL)):
            texts = [run for run in group if isinstance(run, str)]
            encoded = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
            for run in group:
                if isinstance(run, str):
                    ids.append(np.asarray(next(encoded).ids, np.int32))
                else:
                    ids.append(self._id_of_byte[np.frombuffer(run, np.uint8)])
        return np.concatenate(ids)

    def decode(self, ids: Sequence[int] | np.ndarray, continuing: bool = False) -> bytes:
        """Returns the bytes of ids; see `Tokenizer.decode`."""
        return b"".join(self._bytes_of_id[i] for i in checked_ids(ids, self.vocab_size))


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cuts a document into pieces of limited size: after a line end, else between two characters."""
    start = 0
    while start < len(data):
        end = min(start + _PIECE_BYTES, len(data))
        if end < len(data):
            line_end = data.rfind(b"\n", start, end)
            if line_end >= 0:
                end = line_end + 1
            else:
                # A character in UTF-8 has at most three continuation bytes, 10xxxxxx.
                back = next((i for i in range(4) if data[end - i] & 0xC0 != 0x80), 0)
                end = max(end - back, start + 1)
        yield data[start:end]
        start = end


def _runs(data: bytes) -> Iterator[str | bytes]:
    """Yields the runs of `text_runs` of every piece of a document."""
    return (run for piece in _pieces(data) for run in text_runs(piece))
