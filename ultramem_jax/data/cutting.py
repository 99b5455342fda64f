r"""Cuts documents where that changes no id of a tokenizer, as long texts take much memory to encode.

Byte-level BPE merges within words, so the words must begin and end at a cut anyway:

1. After a line end between two characters that are not white space. A word that begins before it may take it
   in (`[\r\n]*` after punctuation, `\s*[\r\n]+`, `\s+(?!\S)|\s+`), but what follows never joins it. The
   optional character before letters excludes line ends, and elsewhere it is only a blank. To the look-ahead
   `(?!\S)`, the end of a text is the same as a single line end before other text. In Tekken's and o200k's
   `[\r\n/]*` a slash does join it, so these are not cut.
2. Before a blank between two letters. Every expression takes one blank into the word that follows, and
   contractions begin with an apostrophe. So texts with "\r\n" or without line ends are cut too.

BPE over characters, as SentencePiece's, merges across words. It is cut after line ends if no token has one
beside another character, as then no merge leads across.

Added tokens are found before all that, so none may reach across a cut.
"""

import re
from collections.abc import Iterator, Mapping

from ultramem_jax.data import pre_tokenizers
from ultramem_jax.data.token_bytes import Tree, is_byte_level, parts_of, without_prefix

_OF_WORDS = re.compile(r"(?<=\S\n)(?=\S)|(?<=[A-Za-z])(?= [A-Za-z])")
_OF_LINES = re.compile(r"(?<=\n)(?=[^\n])")
_LOCAL_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
"""Normalizers that join nothing across a line end or a blank before a letter."""


def cut_places(tree: Tree, id_of: Mapping[str, int]) -> re.Pattern[str] | None:
    """Returns a pattern that finds the places, of no length, where documents may be cut.

    Args:
        tree: the `tokenizer.json`.
        id_of: ids by token, with added tokens.

    Returns:
        The pattern, or None where it is not known that a cut changes no id.
    """
    added = [token for token in tree["added_tokens"] if not token["special"]]
    # What puts a blank before a text also puts one after each added token, but not in later pieces.
    if any(map(_reaches, added)) or (added and without_prefix(tree) != tree):
        return None
    if is_byte_level(tree):
        return _OF_WORDS if _cuts_words(tree) else None
    return _OF_LINES if _merges_within_lines(tree, id_of) else None


def pieces(text: str, places: re.Pattern[str] | None, size: int) -> Iterator[str]:
    """Yields a document in pieces of at least `size` characters, which end where it may be cut."""
    start = 0
    while places is not None and (cut := places.search(text, start + size)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _cuts_words(tree: Tree) -> bool:
    """Tells whether a byte-level tokenizer has only pre-tokenizers and normalizers known here."""
    cuts = False
    for part in parts_of(tree["pre_tokenizer"]):
        kind = part["type"]
        if kind == "Split":
            expression = part["pattern"].get("Regex")
            known = pre_tokenizers.WORDS_AND_LINES | pre_tokenizers.WITHIN_WORDS
            if part["behavior"] != "Isolated" or part["invert"] or expression not in known:
                return False
            cuts |= expression in pre_tokenizers.WORDS_AND_LINES
        elif kind not in ("ByteLevel", "Digits", "Punctuation"):
            return False
        cuts |= kind == "ByteLevel" and part.get("use_regex", True)
    return cuts and all(part["type"] in _LOCAL_NORMALIZERS for part in parts_of(tree["normalizer"]))


def _merges_within_lines(tree: Tree, id_of: Mapping[str, int]) -> bool:
    """Tells whether a tokenizer over characters merges none with a line end but other line ends."""
    model = tree["model"]
    known = model["type"] == "BPE" and model.get("byte_fallback")
    before = [*parts_of(tree["normalizer"]), *parts_of(tree["pre_tokenizer"])]
    for part in before:
        # Prepend and Metaspace add a blank only to the first piece (`token_bytes.without_prefix`).
        of_blanks = part["type"] == "Replace" and part["pattern"] == {"String": " "}
        known = known and (of_blanks or part["type"] in ("Prepend", "Metaspace"))
    return bool(known) and not any("\n" in token and token.strip("\n") for token in id_of)


def _reaches(token: Tree) -> bool:
    """Tells whether an added token could reach across a cut."""
    content = token["content"]
    blanks = any(map(str.isspace, content)) and bool(content.strip())
    return token["lstrip"] or token["rstrip"] or blanks
