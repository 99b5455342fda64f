"""Rebuilds the tokenizer of a model from the metadata of its GGUF file.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp assumes where
a key is missing is in its `src/llama-vocab.cpp`. The result makes the same ids of a text as the
`tokenizer.json` that the file was converted from.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from ultramem_jax.data.file_tokenizers import starting_with
from ultramem_jax.data.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from ultramem_jax.errors import UserError, unknown

_KEYS = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Types of tokens, `tokenizer.ggml.token_type`."""
_BLANK = "\u2581"
"""Character that SentencePiece writes for a blank."""


def gguf_tokenizer(fields: Mapping[str, object], where: str) -> tuple[tokenizers.Tokenizer, int]:
    """Returns the tokenizer of a GGUF file, and the id of its end-of-document token.

    Its post-processor puts the beginning-of-sequence token before a text, if the file or llama.cpp's default
    for its kind says so.

    Args:
        fields: the metadata, plain values by key.
        where: the file, for messages.

    Raises:
        UserError: a key is missing or has another kind of value; the kind of tokenizer, or of its
            pre-tokenizer, is none of those known here.
    """
    metadata = _Metadata(fields, where)
    model = metadata.text("model")
    if model not in _BUILDERS:
        raise unknown(f"{_KEYS}model of {where}", model, _BUILDERS)
    vocabulary = _vocabulary(metadata, spaced=model != "gpt2")
    backend, add_bos, bos = _BUILDERS[model](metadata, vocabulary)
    for i, token in vocabulary.added.items():
        added = AddedToken(token, normalized=False, special=vocabulary.types[i] != _USER_DEFINED)
        (backend.add_tokens if not added.special else backend.add_special_tokens)([added])
    if metadata.flag("add_bos_token", add_bos):
        starting_with(backend, [metadata.token("bos_token_id", len(vocabulary.tokens), bos)])
    return backend, metadata.token("eos_token_id", len(vocabulary.tokens), 2 if bos is not None else None)


@dataclass(frozen=True)
class _Vocabulary:
    """Holds the tokens of a file."""

    tokens: list[str]
    types: list[int]
    id_of: dict[str, int]
    """Ids by token, without padding."""

    @property
    def added(self) -> dict[int, str]:
        """Returns the tokens that are found in a text before all others, by id, in rising order."""
        kinds = (_UNKNOWN, _CONTROL, _USER_DEFINED)
        # Runs of blanks are merged instead: SentencePiece has them as tokens of a user, and the models' own
        # `tokenizer.json` find none of these in a text, as a text has no "▁" before it is normalised.
        found = {i: token for token, i in self.id_of.items() if self.types[i] in kinds}
        return {i: token for i, token in sorted(found.items()) if token.strip(_BLANK)}


class _Metadata:
    """Reads the metadata of a tokenizer, and names the key of what is missing or wrong."""

    def __init__(self, fields: Mapping[str, object], where: str):
        self._fields, self.where = fields, where

    def text(self, key: str, default: str | None = None) -> str:
        value = self._fields.get(_KEYS + key, default)
        self.require(isinstance(value, str), key, "must be a string")
        return str(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._fields.get(_KEYS + key, default)
        self.require(isinstance(value, bool), key, "must be true or false")
        return bool(value)

    def strings(self, key: str) -> list[str]:
        value = self._fields.get(_KEYS + key)
        good = isinstance(value, list) and all(isinstance(each, str) for each in value)
        self.require(good, key, "must be a list of strings")
        assert isinstance(value, list)
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """Returns a list of `count` numbers, one for each token."""
        value = self._fields.get(_KEYS + key)
        good = isinstance(value, list) and all(isinstance(each, int | float) for each in value)
        self.require(good, key, "must be a list of numbers")
        assert isinstance(value, list)
        self.require(len(value) == count, key, f"must have {count} numbers, one for each token")
        return value

    def token(self, key: str, count: int, default: int | None = None) -> int:
        value = self._fields.get(_KEYS + key, default)
        good = isinstance(value, int) and 0 <= value < count
        self.require(good, key, f"must be an id in [0, {count})")
        assert isinstance(value, int)
        return value

    def given(self, key: str) -> bool:
        return _KEYS + key in self._fields

    def require(self, condition: bool, key: str, allowed: str) -> None:
        """Raises `UserError` that names a key unless the condition holds."""
        if not condition:
            value = self._fields.get(_KEYS + key)
            shown = f"{len(value)} entries" if isinstance(value, list) else repr(value)
            raise UserError(f"{self.where}: {_KEYS}{key} = {shown}: {allowed}")


def _vocabulary(metadata: _Metadata, spaced: bool) -> _Vocabulary:
    """Returns the tokens; `spaced` tells whether "▁" stands for blanks in them."""
    tokens = metadata.strings("tokens")
    types = [_NORMAL] * len(tokens)
    if metadata.given("token_type"):
        types = [int(kind) for kind in metadata.numbers("token_type", len(tokens))]
    id_of: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if types[i] == _USER_DEFINED and spaced and not token.strip(" "):
            token = token.replace(" ", _BLANK)  # converters write these runs of SentencePiece's as blanks
        # Converters pad a vocabulary to the rows of the embedding table.
        if token and not (types[i] == _UNUSED and token == f"[PAD{i}]"):
            allowed = f"must differ: {token!r} has the ids {id_of.get(token)} and {i}"
            metadata.require(token not in id_of, "tokens", allowed)
            id_of[token] = i
    return _Vocabulary(tokens, types, id_of)


_Built = tuple[tokenizers.Tokenizer, bool, int | None]
"""The tokenizer, whether texts begin with BOS where the file does not say, and the id of BOS if so."""


def _byte_level(metadata: _Metadata, vocabulary: _Vocabulary) -> _Built:
    """Builds byte-level BPE (GPT-2), whose file has the merges and the name of the pre-tokenizer."""
    name = metadata.text("pre", "default")
    if name not in PRE_TOKENIZERS:
        raise unknown(f"{_KEYS}pre of {metadata.where}", name, PRE_TOKENIZERS)
    before: PreTokenizer = PRE_TOKENIZERS[name]
    merges = _merges(metadata, vocabulary)
    model = models.BPE(vocabulary.id_of, merges, ignore_merges=before.ignore_merges)
    backend = tokenizers.Tokenizer(model)
    if before.normalizer is not None:
        backend.normalizer = before.normalizer
    backend.pre_tokenizer = before.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend, before.add_bos, None


def _merges(metadata: _Metadata, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Returns the merges of the file, pairs of tokens."""
    merges = []
    for merge in metadata.strings("merges"):
        left, _, right = merge.partition(" ")
        known = all(part in vocabulary.id_of for part in (left, right, left + right))
        metadata.require(known, "merges", f"must be pairs of tokens with a blank between them, got {merge!r}")
        merges.append((left, right))
    return merges


def _sentencepiece(metadata: _Metadata, vocabulary: _Vocabulary) -> _Built:
    """Builds SentencePiece's BPE (Llama 1 and 2, Mistral, Gemma), whose file has a score for each token."""
    scores = metadata.numbers("scores", len(vocabulary.tokens))
    merges = _recovered_merges(vocabulary.id_of, scores, vocabulary.types)
    return _with_blanks(metadata, vocabulary, merges, add_prefix=True), True, 1


def _gemma4(metadata: _Metadata, vocabulary: _Vocabulary) -> _Built:
    """Builds the BPE of Gemma 4, which writes blanks as SentencePiece does and whose file has merges."""
    return _with_blanks(metadata, vocabulary, _merges(metadata, vocabulary), add_prefix=False), True, 2


def _with_blanks(
    metadata: _Metadata, vocabulary: _Vocabulary, merges: list[tuple[str, str]], add_prefix: bool
) -> tokenizers.Tokenizer:
    """Returns BPE over characters, with bytes for those that the vocabulary lacks."""
    unknown_id = metadata.token("unknown_token_id", len(vocabulary.tokens), 0)
    model = models.BPE(
        vocabulary.id_of,
        merges,
        unk_token=vocabulary.tokens[unknown_id],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    blanks = normalizers.Replace(" ", _BLANK)
    if metadata.flag("add_space_prefix", add_prefix):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), blanks])
    else:
        backend.normalizer = blanks
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _recovered_merges(
    id_of: Mapping[str, int], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Returns merges that lead to every token, those of tokens with high scores first.

    SentencePiece merges the two neighbours whose joint token has the highest score. Merges have no scores, so
    each pair of tokens that makes up a token is one merge. Pairs of one score come with the longer left
    token first, as in the converter of Hugging Face.
    """
    mergeable = {token: i for token, i in id_of.items() if types[i] in (_NORMAL, _USER_DEFINED)}
    found = []
    for token, i in mergeable.items():
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in mergeable and right in mergeable]
        pairs.sort(key=lambda pair: (mergeable[pair[0]], mergeable[pair[1]]))
        found += [(scores[i], pair) for pair in pairs]
    found.sort(key=lambda entry: (entry[0], len(entry[1][0]), len(entry[1][1])), reverse=True)
    return [pair for _, pair in found]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}
"""Kinds of tokenizers by their names in `tokenizer.ggml.model`."""
