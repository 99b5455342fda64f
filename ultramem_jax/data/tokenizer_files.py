"""Opens the tokenizers of other models: a `tokenizer.json`, a folder that holds one, or a GGUF file.

Files beside a `tokenizer.json`, as models are published, say which token ends a document and whether a
beginning-of-sequence token comes first.
"""

import json
import os
from pathlib import Path

import tokenizers

from ultramem_jax.data.byte_level import read_backend
from ultramem_jax.data.file_tokenizers import FileTokenizer, starting_with
from ultramem_jax.data.gguf_tokenizers import gguf_tokenizer
from ultramem_jax.data.local_files import is_regular
from ultramem_jax.errors import UserError, one_line
from ultramem_jax.gguf_files import open_gguf
from ultramem_jax.tree_types import JsonDict

TOKENIZER_FILE = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that name special tokens."""
_IDS = ("generation_config.json", "config.json")
"""Files of a model that give the ids of special tokens."""
_USUAL_ENDS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|END_OF_TURN_TOKEN|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|eos|>",
    "[EOS]",
    "[SEP]",
)
"""Written forms that end a document in most vocabularies. The first that is there counts, if no file says."""
_MAGIC = b"GGUF"
ALLOWED = f"a {TOKENIZER_FILE}, a folder that holds one, or a GGUF file"


def open_tokenizer(path: str | os.PathLike[str]) -> FileTokenizer:
    """Returns the tokenizer of a file, or of the `tokenizer.json` in a folder.

    The end-of-document token is the `eos_token` of the files beside a `tokenizer.json`, the first of
    `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and `config.json` that has
    one. Without them it is a token of one of the usual names. A GGUF file has `tokenizer.ggml.eos_token_id`.

    Args:
        path: a `tokenizer.json`, under any name; a folder that holds one; or a GGUF file. "~" is the home
            folder.

    Raises:
        UserError: there is no such file, it is damaged, it is of a kind that is not known here, or nothing
            says which token ends a document.
    """
    given = Path(path).expanduser()
    file = given / TOKENIZER_FILE if given.is_dir() else given
    if not is_regular(file):
        raise UserError(f"{file}: no such file: a tokenizer comes from {ALLOWED}")
    try:
        with open(file, "rb") as opened:
            magic = opened.read(len(_MAGIC))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if magic == _MAGIC or file.suffix == ".gguf":
        backend, eos_id = gguf_tokenizer(open_gguf(file).fields, str(file))
        return FileTokenizer(backend, eos_id=eos_id, name=file.name, where=str(file))
    backend = read_backend(file, "must be a tokenizer.json")
    settings = _neighbours(file)
    _apply_bos(backend, settings, file)
    # The names of most files are the same, and say less than those of their folders.
    name = f"{file.absolute().parent.name}/{file.name}" if file.name == TOKENIZER_FILE else file.name
    return FileTokenizer(backend, eos_id=_eos_id(backend, settings, file), name=name, where=str(file))


def _neighbours(file: Path) -> dict[str, JsonDict]:
    """Returns the contents of the files beside a `tokenizer.json` that say more of it, by name.

    A file of another name may lie beside those of other models.
    """
    found = {}
    for name in (*_SETTINGS, *_IDS) if file.name == TOKENIZER_FILE else ():
        path = file.with_name(name)
        if not is_regular(path):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: must be JSON in UTF-8: {one_line(error)}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: must be a JSON object, it is {type(content).__name__}")
        found[name] = content
    return found


def _special(settings: dict[str, JsonDict], key: str) -> tuple[str, str] | None:
    """Returns the written form of a special token, and the file that names it; None if no file does."""
    for name in _SETTINGS:
        token = settings.get(name, {}).get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token, name
    return None


def _eos_id(backend: tokenizers.Tokenizer, settings: dict[str, JsonDict], file: Path) -> int:
    """Returns the id of the end-of-document token."""
    named = _special(settings, "eos_token")
    if named is not None:
        return _id(backend, *named, file)
    for name in _IDS:
        ids = settings.get(name, {}).get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if type(first) is int:
            return first
    usual = (backend.token_to_id(token) for token in _USUAL_ENDS)
    found = next((i for i in usual if i is not None), None)
    if found is None:
        raise UserError(
            f"{file}: nothing says which token ends a document: a {_SETTINGS[0]} beside it must have "
            f"'eos_token', or the vocabulary one of {', '.join(_USUAL_ENDS[:3])}"
        )
    return int(found)


def _apply_bos(backend: tokenizers.Tokenizer, settings: dict[str, JsonDict], file: Path) -> None:
    """Applies `add_bos_token`, which overrides what the `tokenizer.json` puts before a text."""
    adds = settings.get(_SETTINGS[0], {}).get("add_bos_token")
    if not isinstance(adds, bool):
        return
    bos = _special(settings, "bos_token")
    if adds and bos is not None:
        starting_with(backend, [_id(backend, *bos, file)])
    elif not adds:
        starting_with(backend, [])


def _id(backend: tokenizers.Tokenizer, token: str, name: str, file: Path) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise UserError(f"{file.with_name(name)}: {token!r} must be a token of {file}, which has none such")
    return int(found)
