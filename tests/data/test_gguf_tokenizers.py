"""Tokenizers that are rebuilt from GGUF metadata make the ids of those that the metadata comes from."""

import itertools

import pytest

from tests.data.trained_tokenizers import BOS, EOS, TORTURE, USER, byte_level, sentencepiece
from tests.support.gguf_models import KEYS, tokenizer_fields
from ultramem_jax import UserError
from ultramem_jax.data import FileTokenizer, open_tokenizer
from ultramem_jax.data.byte_level import byte_characters
from ultramem_jax.data.gguf_tokenizers import gguf_tokenizer
from ultramem_jax.data.pre_tokenizers import PRE_TOKENIZERS

DISTINCT = sorted({id(kind): name for name, kind in PRE_TOKENIZERS.items()}.values())


def rebuilt(fields):
    backend, eos_id = gguf_tokenizer(fields, "model.gguf")
    return FileTokenizer(backend, eos_id=eos_id, name="model.gguf", where="model.gguf")


@pytest.mark.parametrize("name", DISTINCT)
def test_ids_are_those_of_the_original(name):
    original = byte_level(PRE_TOKENIZERS[name])
    tokenizer = rebuilt(tokenizer_fields(original, name))
    original.encode_special_tokens = True
    for text in TORTURE:
        ids = tokenizer.encode(text.encode()).tolist()
        assert ids == original.encode(text, add_special_tokens=False).ids
        normalizer = PRE_TOKENIZERS[name].normalizer
        text = normalizer.normalize_str(text) if normalizer else text
        assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.vocab_size == original.get_vocab_size()  # padding is no token


TEXT = "It's WE'LL 12345!\n/x  y\r\n\r\n\tHTTPServer e\u0301漢字か a+=b?)"
WORDS = {
    "gpt-2": "It|'s| WE|'|LL| 12345|!|\n|/|x| | y|\r\n\r\n|\t|HTTPServer| e|\u0301|漢字か| a|+=|b|?)",
    "smollm": "It|'s| WE|'|LL| |1|2|3|4|5|!|\n|/|x| | y|\r\n\r\n|\t|HTTPServer| e|\u0301|漢字か| a|+=|b|?)",
    "llama-bpe": "It|'s| WE|'LL| |123|45|!\n|/x| | y|\r\n\r\n|\tHTTPServer| e|\u0301漢字か| a|+=|b|?)",
    "qwen2": "It|'s| WE|'LL| |1|2|3|4|5|!\n|/x| | y|\r\n\r\n|\tHTTPServer| e|\u0301漢字か| a|+=|b|?)",
    "qwen35": "It|'s| WE|'LL| |1|2|3|4|5|!\n|/x| | y|\r\n\r\n|\tHTTPServer| e\u0301漢字か| a|+=|b|?)",
    "tekken": "It|'s| WE|'LL| |1|2|3|4|5|!\n/|x| | y|\r\n\r\n|\tHTTPServer| e\u0301漢字か| a|+=|b|?)",
    "gpt-4o": "It's| WE'LL| |123|45|!\n/|x| | y|\r\n\r\n|\tHTTPServer| e\u0301漢字か| a|+=|b|?)",
    "deepseek-coder": "It|'|s| WE|'|LL| |1|2|3|4|5|!|\n|/|x| | y|\r|\n|\r|\n|\tHTTPServer| e|\u0301|漢字か"
    "| a|+=|b|?)",
    "deepseek-v3": "It|'s| WE|'LL| |123|45|!\n|/x| | y|\r\n\r\n|\tHTTPServer| e\u0301|漢字か| a|+=|b|?)",
}
ALIKE = {
    "gpt-2": ("default", "phi-2", "mpt", "olmo"),
    "smollm": ("starcoder", "refact", "codeshell", "command-r"),
    "llama-bpe": ("llama3", "llama-v3"),
    "qwen2": ("deepseek-r1-qwen",),
    "gpt-4o": ("llama4",),
    "deepseek-coder": ("deepseek-llm",),
}
"""Others that cut this text in the same way. Falcon's words are no whole characters."""


@pytest.mark.parametrize("name", WORDS)
def test_words_are_those_of_the_model(name):
    byte_of = {character: byte for byte, character in byte_characters().items()}
    for each in (name, *ALIKE.get(name, ())):
        words = PRE_TOKENIZERS[each].pre_tokenizer.pre_tokenize_str(TEXT)
        texts = [bytes(byte_of[c] for c in word).decode() for word, _ in words]
        assert "|".join(texts) == WORDS[name]


def test_every_name_is_compared():
    alike = {other for others in ALIKE.values() for other in others}
    assert {*WORDS, *alike, "falcon"} == PRE_TOKENIZERS.keys()


# ---- SentencePiece


def spm_fields(prefix):
    backend = sentencepiece(prefix)
    size = backend.get_vocab_size()
    tokens = [backend.id_to_token(i) for i in range(size)]
    types = [2, 3, 3, *[6] * 256, *[1] * (size - 259)]
    # A token of the user's, and runs of blanks, which converters write with blanks.
    tokens += [USER, "  ", "    "]
    types += [4, 4, 4]
    scores = [0.0] * 259 + [-float(i) for i in range(size - 259)] + [0.0] * 3
    fields = {
        KEYS + "model": "llama",
        KEYS + "tokens": tokens,
        KEYS + "token_type": types,
        KEYS + "scores": scores,
        KEYS + "bos_token_id": 1,
        KEYS + "eos_token_id": 2,
        KEYS + "unknown_token_id": 0,
    }
    return fields if prefix else fields | {KEYS + "add_space_prefix": False}


def sentencepiece_ids(fields, text, prefix):
    """Merges the two neighbours whose joint token has the highest score, the first of them, until none is."""
    tokens, scores, types = (fields[KEYS + key] for key in ("tokens", "scores", "token_type"))
    pieces = {t.replace(" ", "▁"): i for i, t in enumerate(tokens) if types[i] in (1, 4)}
    ids = []
    for number, part in enumerate(text.split(USER)):
        if number:
            ids.append(tokens.index(USER))
        symbols = list(("▁" if prefix and part else "") + part.replace(" ", "▁"))
        while True:
            joint = [pieces.get(a + b) for a, b in itertools.pairwise(symbols)]
            found = [(-scores[i], at) for at, i in enumerate(joint) if i is not None]
            if not found:
                break
            at = min(found)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            known = [pieces[symbol]] if symbol in pieces else [3 + byte for byte in symbol.encode()]
            ids += known
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_against_its_definition(prefix):
    fields = spm_fields(prefix)
    tokenizer = rebuilt(fields)
    for text in TORTURE:
        ids = tokenizer.encode(text.encode()).tolist()
        assert ids == sentencepiece_ids(fields, text, prefix), text
        if "▁" not in text and USER not in text:
            assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.start_ids == (1,) and tokenizer.eos_id == 2


def test_sentencepiece_makes_the_ids_of_its_tokenizer_json():
    original = sentencepiece()
    fields = spm_fields(True)
    for key in ("tokens", "token_type", "scores"):
        fields[KEYS + key] = fields[KEYS + key][:-3]
    tokenizer = rebuilt(fields)
    original.encode_special_tokens = True
    for text in TORTURE:
        assert tokenizer.encode(text.encode()).tolist() == original.encode(text, add_special_tokens=False).ids


# ---- special tokens


@pytest.mark.parametrize(
    ("name", "given", "starts"),
    [
        ("gpt-2", None, EOS),
        ("llama-bpe", None, BOS),
        ("llama-bpe", False, EOS),
        ("tekken", None, BOS),
        ("qwen2", True, BOS),
    ],
)
def test_bos_comes_first_where_the_file_or_its_kind_says_so(name, given, starts):
    original = byte_level(PRE_TOKENIZERS[name])
    fields = tokenizer_fields(original, name)
    if given is not None:
        fields[KEYS + "add_bos_token"] = given
    assert rebuilt(fields).start_ids == (original.token_to_id(starts),)


def test_special_tokens_come_only_if_asked_for():
    original = byte_level(PRE_TOKENIZERS["llama-bpe"])
    tokenizer = rebuilt(tokenizer_fields(original, "llama-bpe"))
    eos, user = original.token_to_id(EOS), original.token_to_id(USER)
    text = f"a{EOS}{USER}b".encode()
    plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
    assert eos not in plain and user in plain and tokenizer.decode(plain) == text
    assert special.tolist() == original.encode(text.decode(), add_special_tokens=False).ids
    assert eos in special and tokenizer.decode(special) == f"a{USER}b".encode()
    assert eos not in tokenizer.encode(text)  # the question leaves nothing behind


def test_a_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    original = byte_level(PRE_TOKENIZERS["smollm"])
    fields = tokenizer_fields(original, "smollm")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(fields[KEYS + "tokens"])
    writer.add_token_types(fields[KEYS + "token_type"])
    writer.add_token_merges(fields[KEYS + "merges"])
    writer.add_eos_token_id(fields[KEYS + "eos_token_id"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = open_tokenizer(tmp_path / "model.gguf")
    assert tokenizer.name == "model.gguf"
    original.encode_special_tokens = True
    for text in TORTURE:
        assert tokenizer.encode(text.encode()).tolist() == original.encode(text, add_special_tokens=False).ids


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, r"model\.gguf: tokenizer\.ggml\.model = None: must be a string"),
        ({"model": "bert"}, r"unknown tokenizer\.ggml\.model of model\.gguf 'bert': known are gemma4, gpt2"),
        ({"pre": "smolm"}, r"unknown tokenizer\.ggml\.pre of .* 'smolm': did you mean 'smollm'\?"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens = None: must be a list of strings"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens = 2 entries: must be a list of strings"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, r"tokens = 2 entries: must differ: 'a' has the ids"),
        ({"token_type": [1]}, r"token_type = 1 entries: must have \d+ numbers, one for each token"),
        ({"merges": None}, r"tokenizer\.ggml\.merges = None: must be a list of strings"),
        ({"merges": ["qq zz"]}, r"merges = 1 entries: must be pairs of tokens .*, got 'qq zz'"),
        ({"eos_token_id": None}, r"tokenizer\.ggml\.eos_token_id = None: must be an id in \[0, \d+\)"),
        ({"eos_token_id": 10**6}, r"tokenizer\.ggml\.eos_token_id = 1000000: must be an id"),
        ({"add_bos_token": 1}, r"tokenizer\.ggml\.add_bos_token = 1: must be true or false"),
        ({"add_bos_token": True, "bos_token_id": -1}, r"tokenizer\.ggml\.bos_token_id = -1: must be an id"),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores = None: must be a list of numbers"),
    ],
)
def test_bad_metadata_gets_one_line(change, message):
    fields = tokenizer_fields(byte_level(PRE_TOKENIZERS["gpt-2"]), "gpt-2")
    fields |= {KEYS + key: value for key, value in change.items()}
    with pytest.raises(UserError, match=message) as error:
        rebuilt({key: value for key, value in fields.items() if value is not None})
    assert "\n" not in str(error.value)
