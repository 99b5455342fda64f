"""Says which bytes each token of a tokenizer stands for, and where it adds a blank to a text."""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

from ultramem_jax.data.byte_level import byte_characters
from ultramem_jax.errors import UserError

Tree: TypeAlias = dict[str, Any]
"""A `tokenizer.json`, or a part of it."""

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_MODELS = ("BPE", "Unigram")
_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip")


def parts_of(part: Tree | None) -> Iterator[Tree]:
    """Yields the parts of a normalizer, pre-tokenizer or decoder, those of sequences one by one."""
    if part is None:
        return
    inner = next((part[name] for name in _SEQUENCES if name in part), None)
    if part.get("type") != "Sequence" or inner is None:
        yield part
        return
    for each in inner:
        yield from parts_of(each)


_SEQUENCES = ("normalizers", "pretokenizers", "decoders")


def is_byte_level(tree: Tree) -> bool:
    """Tells whether tokens are written in GPT-2's characters for bytes."""
    decoder = list(parts_of(tree["decoder"] or tree["pre_tokenizer"]))
    return any(part["type"] == "ByteLevel" for part in decoder)


def byte_fallback_ids(tree: Tree, id_of: Mapping[str, int]) -> dict[int, int]:
    """Returns byte -> id of the token that stands for it alone, for those bytes that have one."""
    if is_byte_level(tree):
        return {byte: id_of[c] for byte, c in byte_characters().items() if c in id_of}
    if not tree["model"].get("byte_fallback"):
        return {}
    return {byte: id_of[f"<0x{byte:02X}>"] for byte in range(256) if f"<0x{byte:02X}>" in id_of}


def bytes_of_tokens(tree: Tree, id_of: Mapping[str, int], where: str) -> dict[int, bytes]:
    """Returns id -> bytes of the text that each token stands for, special tokens included.

    Args:
        tree: the `tokenizer.json`.
        id_of: ids by token, with added tokens.
        where: the file, for messages.

    Raises:
        UserError: a part of the tokenizer makes texts of tokens in another way than those known here.
    """
    _require_known(tree, where)
    added = {token["id"]: token["content"] for token in tree["added_tokens"]}
    found = {i: content.encode() for i, content in added.items()}
    rest = {i: token for token, i in id_of.items() if i not in added}
    if is_byte_level(tree):
        byte_of = {character: byte for byte, character in byte_characters().items()}
        for i, token in rest.items():
            known = all(character in byte_of for character in token)
            found[i] = bytes(byte_of[character] for character in token) if known else token.encode()
        return found
    blank = _blank(tree)
    falls_back = any(part["type"] == "ByteFallback" for part in parts_of(tree["decoder"]))
    for i, token in rest.items():
        byte = _BYTE.fullmatch(token) if falls_back else None
        found[i] = bytes([int(byte[1], 16)]) if byte else token.replace(blank, " ").encode()
    return found


def without_prefix(tree: Tree) -> Tree:
    """Returns the tokenizer without the parts that put a blank before a text; equal if it has none."""
    tree = copy.copy(tree)
    tree["normalizer"] = _mapped(tree["normalizer"])
    tree["pre_tokenizer"] = _mapped(tree["pre_tokenizer"])
    return tree


def without_special(tree: Tree, special_ids: Collection[int]) -> Tree:
    """Returns the tokenizer for texts in which the written forms of special tokens are text.

    Unigram finds every token of its vocabulary in a text, so special ones get names that no text has: blanks
    do not reach the model, which knows them as "▁". The result of other tokenizers is the same tree: they
    have no merges that lead to special tokens.
    """
    if tree["model"]["type"] != "Unigram":
        return tree
    pieces = enumerate(tree["model"]["vocab"])
    vocab = [[f" {i}" if i in special_ids else piece, score] for i, (piece, score) in pieces]
    added = [token for token in tree["added_tokens"] if not token["special"]]
    return tree | {"model": tree["model"] | {"vocab": vocab}, "added_tokens": added}


def _mapped(part: Tree | None) -> Tree | None:
    """Returns a part without what adds a blank."""
    if part is None or part["type"] == "Prepend":
        return None
    part = dict(part)
    for name in _SEQUENCES:
        if name in part:
            part[name] = [each for each in map(_mapped, part[name]) if each is not None]
    if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
        part.pop("add_prefix_space", None)  # its name before version 0.15 of the library
    elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
        part["add_prefix_space"] = False
    return part


def _require_known(tree: Tree, where: str) -> None:
    """Refuses a tokenizer whose tokens' bytes are not known here."""
    model = tree["model"]
    kind = model.get("type", "BPE")
    if kind not in _MODELS:
        raise UserError(f"{where}: model = {kind!r}: must be one of {', '.join(_MODELS)}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"{where}: model.{name} = {model[name]!r}: must be empty")
    decoder = list(parts_of(tree["decoder"]))
    for part in decoder:
        if part["type"] not in _DECODERS or (part["type"] == "Replace" and not _replaces_blank(part)):
            known = ", ".join(_DECODERS)
            raise UserError(f"{where}: decoder = {part['type']!r}: must be one of {known} (of a blank)")
    pre = [part["type"] for part in parts_of(tree["pre_tokenizer"])]
    if not decoder and "ByteLevel" not in pre:
        raise UserError(f"{where}: decoder = None: must say which text the tokens stand for")


def _replaces_blank(part: Tree) -> bool:
    """Tells whether a decoder puts blanks in place of one string."""
    return part["content"] == " " and bool(part["pattern"].get("String"))


def _blank(tree: Tree) -> str:
    """Returns what stands for a blank in tokens, or a blank if nothing else does."""
    for part in parts_of(tree["decoder"]):
        if part["type"] == "Metaspace":
            return str(part["replacement"])
        if part["type"] == "Replace":
            return str(part["pattern"]["String"])
    return " "
