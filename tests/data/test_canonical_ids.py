"""Tokens that read the same share a canonical id, and only they."""

import re
import unicodedata

import chex
import numpy as np
import pytest
import tokenizers as library
from tokenizers import models, pre_tokenizers, trainers

from ultramem_jax.data import byte_level
from ultramem_jax.data.canonical_ids import canonical_ids, normalised
from ultramem_jax.data.tokenizers import EOS_TOKEN, BpeTokenizer, ByteTokenizer


def _bpe(tokens):
    """A tokenizer with the 256 bytes, the end-of-document token and `tokens`, in this order."""
    characters = byte_level.byte_characters()
    written = [characters[byte] for byte in range(256)] + [EOS_TOKEN]
    for token in tokens:
        written.append("".join(characters[byte] for byte in token))
    backend = library.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(written)}, merges=[]))
    backend.add_special_tokens([EOS_TOKEN])
    return BpeTokenizer(backend)


def _same(*tokens):
    """Whether all tokens, each of two bytes or more, have one canonical id."""
    ids = canonical_ids(_bpe([t.encode() if isinstance(t, str) else t for t in tokens]))
    return len(np.unique(ids[257:])) == 1


@pytest.mark.parametrize(
    "tokens",
    [
        ("Hello", " hello", "HELLO", "hello ", "\n\thello", "Ｈｅｌｌｏ"),
        ("été", "Ete", "e\u0301te"),
        ("ﬁn", "fin", "FIN"),  # a ligature
        ("  ", "\n\n", " \r\n\t", "\u00a0", "\u3000"),
        ("a b", "a\t \nb"),
        ("한", "\u1112\u1161\u11ab"),  # a syllable and its letters
    ],
)
def test_tokens_that_read_the_same_share_an_id(tokens):
    assert _same(*tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        ("ab", "a b"),
        ("hello", "hello!"),
        ("  ", "\x0b\x0c"),  # nothing is left of the second, which hence stays itself
        ("\u0301", "\u0300"),  # accents without a letter
        ("  ", "\ue000"),
        (b"\xe6\xbc", b"\xe6\xbd"),  # parts of characters
        ("ð", b"\xc3\xf0"),
        (b"\xc3A", b"\xc3a"),
        ("\ufffda", "\ufffdA"),
    ],
)
def test_other_tokens_do_not(tokens):
    assert not _same(*tokens)


def test_ids_are_numbered_by_first_appearance():
    ids = canonical_ids(_bpe([b"ab", b" AB", b"  ", b"\xe6\xbc", "é".encode(), b"cd"]))
    chex.assert_type(ids, np.int32)
    chex.assert_shape(ids, (263,))
    _, first = np.unique(ids, return_index=True)
    assert (np.diff(first) > 0).all() and ids.min() == 0 and ids.max() == len(first) - 1
    # Bytes: tab, line feed, carriage return and space are one, "A" to "Z" are "a" to "z".
    assert ids[:33].tolist() == [*range(10), 9, *range(10, 12), 9, *range(12, 30), 9]
    assert (ids[ord("A") : ord("Z") + 1] == ids[ord("a") : ord("z") + 1]).all()
    assert len(first) == (256 - 3 - 26) + 1 + 3  # end of document; "ab", the part of a character, "cd"
    last = ids.max()
    assert ids[256:].tolist() == [last - 3, last - 2, last - 2, 9, last - 1, ids[ord("e")], last]


def test_special_tokens_share_their_ids_with_none():
    backend = library.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=[EOS_TOKEN, "<s>", "<S>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([], trainer)
    tokenizer = BpeTokenizer(backend)
    assert tokenizer.special_ids == {0, 1, 2}
    ids = canonical_ids(tokenizer)
    assert [np.count_nonzero(ids == ids[i]) for i in range(3)] == [1, 1, 1]


def test_trained_bpe_against_the_standard_library():
    text = "The cat, the CAT; THE the\n\n  the naïve NAÏVE naive café\tcafe — 漢字 漢語 ½ ² 2 ﬁn fin. " * 30
    tokenizer = BpeTokenizer.train([text.encode()], vocab_size=400)
    ids = canonical_ids(tokenizer)
    keys = {}
    expected = [keys.setdefault(_key(tokenizer, i), len(keys)) for i in range(tokenizer.vocab_size)]
    assert ids.tolist() == expected
    assert 0.5 < len(keys) / tokenizer.vocab_size < 0.95


def test_bytes_keep_their_ids():
    ids = canonical_ids(ByteTokenizer())
    assert ids.tolist() == list(range(257))
    chex.assert_type(ids, np.int32)


def test_texts_by_hand():
    for text, expected in [
        (" Été\n", "ete"),
        ("\r\n", " "),
        ("a \t b", "a b"),
        ("İ", "i"),
        ("ａ１", "a1"),
        ("\x0b", "\x0b"),
    ]:
        assert normalised(text) == expected


def _key(tokenizer, i):
    try:
        text = tokenizer.decode([i]).decode()
    except UnicodeDecodeError:
        return i
    if i == tokenizer.eos_id:
        return i
    letters = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    letters = "".join(c for c in letters if not unicodedata.category(c).startswith("M")).lower()
    letters = re.sub("[ \t\r\n]+", " ", letters)
    return letters if letters == " " else letters.strip() or text
