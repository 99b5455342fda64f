"""Maps the vocabulary onto fewer ids, so that tokens that read the same share an id."""

from collections.abc import Hashable

import numpy as np
from tokenizers import Regex, normalizers

from ultramem_jax.data.tokenizers import ByteTokenizer, Tokenizer

_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
    ]
)
_STRIP = normalizers.Strip()


def canonical_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the canonical id of every token (Engram, arXiv 2601.07372, section 2.2).

    Tokens share an id if their texts are equal once normalised: NFKC, then NFD without combining marks, lower
    case, runs of blanks and line ends as one space, no space at either end. A text of only space becomes one
    space. A text of which nothing would be left stays as it is. These tokens share their id with no other:
    special tokens, and tokens whose bytes are not UTF-8 or hold U+FFFD. The map of a `ByteTokenizer` is the
    identity.

    Returns:
        (V,) int32 in [0, V_c), numbered in the order of each id's first token; V_c is the largest plus one.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return np.arange(tokenizer.vocab_size, dtype=np.int32)
    special = tokenizer.special_ids
    found: dict[Hashable, int] = {}
    canonical = np.empty(tokenizer.vocab_size, np.int32)
    for i in range(tokenizer.vocab_size):
        text = None if i in special else _text(tokenizer.decode([i], continuing=True))
        # A token without text uses its id as its key, because no text equals a number.
        key = i if text is None else normalised(text)
        canonical[i] = found.setdefault(key, len(found))
    return canonical


def normalised(text: str) -> str:
    """Returns the form of a text that decides its canonical id, as described at `canonical_ids`.

    >>> normalised("  Été")
    'ete'
    """
    collapsed = _NORMALIZER.normalize_str(text)
    return collapsed if collapsed == " " else _STRIP.normalize_str(collapsed) or text


def _text(data: bytes) -> str | None:
    """Returns the text of UTF-8 bytes, or None if they are not UTF-8 or hold U+FFFD."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\ufffd" in text else text
