"""Writes tokens for people: every byte and every control character becomes something that can be seen."""

import unicodedata
from collections.abc import Iterable

from ultramem_jax.data import Tokenizer

_NAMED = {"\n": "↵", "\t": "⇥"}


class TokenTexts:
    """Writes the tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        """Takes the tokenizer, whose tokens are written one by one."""
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def is_special(self, token: int) -> bool:
        """Tells whether a token is not text, or no token of the tokenizer at all."""
        return token in self._tokenizer.special_ids or not 0 <= token < self._tokenizer.vocab_size

    def piece(self, token: int) -> bytes:
        """Returns the bytes of a token within a text."""
        if token not in self._bytes:
            known = 0 <= token < self._tokenizer.vocab_size
            self._bytes[token] = self._tokenizer.decode([token], continuing=True) if known else b""
        return self._bytes[token]

    def token(self, token: int) -> str:
        """Returns one token as text; bytes that are no UTF-8 are written as hexadecimal numbers."""
        piece = self.piece(token)
        if self.is_special(token) or not piece:
            return self._special(token)
        return visible(piece.decode(errors="backslashreplace"))

    def text(self, ids: Iterable[int]) -> str:
        """Returns several tokens as one text; negative ids are left out, and broken UTF-8 becomes U+FFFD."""
        parts: list[str] = []
        waiting = b""
        for token in map(int, ids):
            if token < 0:
                continue
            if not self.is_special(token):
                waiting += self.piece(token)
                continue
            parts += [visible(waiting.decode(errors="replace")), self._special(token)]
            waiting = b""
        return "".join([*parts, visible(waiting.decode(errors="replace"))])

    def _special(self, token: int) -> str:
        if token == self._tokenizer.eos_id:
            return "⟨end of text⟩"
        return "⟨start⟩" if token in self._tokenizer.start_ids else f"⟨{token}⟩"


def visible(text: str) -> str:
    r"""Returns a text in which characters that control, join or reorder others are written out.

    >>> visible("a\nb\x00")
    'a↵b\\x00'
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"\\u{code:04x}"
    return character
