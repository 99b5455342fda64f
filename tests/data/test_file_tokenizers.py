"""Tokenizers of files make the ids of their models, count bytes exactly, and are refused in one line."""

import json

import numpy as np
import pytest
import tokenizers as library
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from tests.data.trained_tokenizers import BOS, EOS, PROSE, TORTURE, USER, byte_level, sentencepiece, unigram
from ultramem_jax import UserError
from ultramem_jax.data import file_tokenizers, open_tokenizer
from ultramem_jax.data.canonical_ids import canonical_ids
from ultramem_jax.data.cutting import pieces
from ultramem_jax.data.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

GPT2 = PRE_TOKENIZERS["gpt-2"]
KINDS = {
    "byte level": lambda: byte_level(GPT2),
    "byte level with a blank": lambda: byte_level(GPT2, prefix=True),
    "digits": lambda: byte_level(PRE_TOKENIZERS["smollm"]),
    "sentencepiece": sentencepiece,
    "sentencepiece without a blank": lambda: sentencepiece(prefix=False),
    "unigram": unigram,
}
BYTE_LEVEL = ("byte level", "byte level with a blank", "digits")


def opened(backend, folder, **settings):
    backend.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_tokenizer(folder)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def original(kind):
    return KINDS[kind]()


def test_ids_are_those_of_the_library(kind, original, tmp_path):
    tokenizer = opened(original, tmp_path)
    original.encode_special_tokens = True
    for text in TORTURE:
        ids = tokenizer.encode(text.encode())
        assert ids.dtype == np.int32 and not tokenizer.special_ids & set(ids.tolist())
        if kind == "unigram" and "</s>" in text:
            continue  # the library finds special tokens in the vocabulary itself
        assert ids.tolist() == original.encode(text, add_special_tokens=False).ids
    assert tokenizer.vocab_size == max(original.get_vocab().values()) + 1


def test_bytes_are_counted_exactly(kind, original, tmp_path):
    tokenizer = opened(original, tmp_path)
    for text in TORTURE:
        data = text.encode()
        if "▁" in text and kind not in BYTE_LEVEL:
            continue  # it reads as a blank
        if kind == "unigram" and (text.startswith(" ") or "<0x" in text):
            continue  # no blank is put before it, and written forms of bytes are bytes
        if kind == "byte level with a blank" and (text.startswith(" ") or USER in text):
            continue  # likewise, and one is put after an added token
        ids = tokenizer.encode(data)
        assert tokenizer.decode(ids) == data
        lengths = [*tokenizer.first_id_bytes[ids[:1]], *tokenizer.id_bytes[ids[1:]]]
        assert sum(lengths) == len(data)
        # Among others, a document begins after an end or what the tokenizer puts in front.
        between = [*ids, tokenizer.eos_id, *tokenizer.start_ids, *ids]
        assert tokenizer.decode(between) == data * 2


def test_a_blank_before_the_text_is_left_out_only_at_the_beginning(tmp_path):
    tokenizer = opened(sentencepiece(), tmp_path)
    ids = tokenizer.encode(b"the cat")
    assert tokenizer.decode(ids) == b"the cat" and tokenizer.decode(ids, continuing=True) == b" the cat"
    assert tokenizer.first_id_bytes[ids[0]] == tokenizer.id_bytes[ids[0]] - 1
    assert tokenizer.decode(tokenizer.encode(b" the cat")) == b" the cat"


@pytest.mark.parametrize("data", [b"\xff", b"a\xe6\xbcb \xf0\x9f c", bytes(range(256)), b"\xed\xa0\x80 the"])
def test_bytes_that_are_no_text(data, tmp_path):
    for number, make in enumerate(KINDS.values()):
        (tmp_path / str(number)).mkdir()
        tokenizer = opened(make(), tmp_path / str(number))
        assert tokenizer.decode(tokenizer.encode(data)) == data


def test_without_tokens_for_bytes_they_are_replaced(tmp_path):
    backend = library.Tokenizer(models.BPE({"a": 0, "�": 1, "</s>": 2, "▁": 3}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.add_special_tokens(["</s>"])
    tokenizer = opened(backend, tmp_path)
    assert tokenizer.encode(b"a\xff a\xfe").tolist() == [0, 1, 3, 0, 1]
    assert tokenizer.decode([0, 1, 3, 0]) == "a� a".encode()


# ---- long documents


DISTINCT = sorted({id(kind): name for name, kind in PRE_TOKENIZERS.items()}.values())


@pytest.mark.parametrize("name", [*DISTINCT, "sentencepiece"])
def test_cutting_a_document_changes_no_id(name, tmp_path, monkeypatch):
    original = byte_level(PRE_TOKENIZERS[name]) if name in DISTINCT else sentencepiece(lines=False)
    tokenizer = opened(original, tmp_path)
    original.encode_special_tokens = True
    random = np.random.default_rng(0)
    parts = [*TORTURE, *PROSE.split(), "\n", " ", "\r\n", "!\n", "\n/", "'", "s", " a", "b ", "1"]
    for _ in range(20):
        text = "".join(random.choice(parts, 60))
        expected = original.encode(text, add_special_tokens=False).ids
        for size in (1, 50):
            monkeypatch.setattr(file_tokenizers, "_PIECE_CHARACTERS", size)
            assert tokenizer.encode(text.encode()).tolist() == expected
        assert len(list(pieces(text, tokenizer._cut_places, 50))) > 2 or name in ("tekken", "llama4")


@pytest.mark.parametrize(
    ("cuts", "change"),
    [
        (True, lambda backend: None),
        (
            True,
            lambda backend: backend.add_tokens([AddedToken("    "), AddedToken("\n\n"), AddedToken("ab")]),
        ),
        (False, lambda backend: backend.add_tokens([AddedToken("x\ny")])),
        (False, lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel())),
        (False, lambda backend: backend.add_tokens([AddedToken("<tool>", lstrip=True)])),
        (True, lambda backend: backend.add_special_tokens([AddedToken("<tool>", lstrip=True)])),
        (False, lambda backend: setattr(backend, "normalizer", library.normalizers.Strip())),
        (False, lambda backend: setattr(backend, "pre_tokenizer", PRE_TOKENIZERS["gpt-4o"].pre_tokenizer)),
        (False, lambda backend: setattr(backend, "pre_tokenizer", _unknown())),
        (False, lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False))),
    ],
)
def test_documents_are_cut_only_where_that_is_known_to_be_safe(cuts, change, tmp_path):
    backend = byte_level(GPT2)
    change(backend)
    tokenizer = opened(backend, tmp_path)
    assert list(pieces("x\ny", tokenizer._cut_places, 1)) == (["x\n", "y"] if cuts else ["x\ny"])


def _unknown():
    kind = pre_tokenizers.Split(Regex(".*x\n"), "isolated")
    return pre_tokenizers.Sequence([kind, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def test_settings_for_training_do_not_matter(tmp_path):
    backend = byte_level(GPT2)
    expected = backend.encode(PROSE, add_special_tokens=False).ids
    backend.enable_truncation(4)
    backend.enable_padding(length=1000)
    backend.model.dropout = 0.9
    assert opened(backend, tmp_path).encode(PROSE.encode()).tolist() == expected


# ---- special tokens


def test_special_tokens_come_only_if_asked_for(tmp_path):
    backend = byte_level(GPT2)
    tokenizer = opened(backend, tmp_path)
    text = f"{USER}hi{EOS}"
    user, eos = backend.token_to_id(USER), backend.token_to_id(EOS)
    plain, special = tokenizer.encode(text.encode()), tokenizer.encode(text.encode(), special=True)
    assert plain[0] == special[0] == user and special[-1] == eos and eos not in plain
    assert tokenizer.special_ids == {eos, backend.token_to_id(BOS)}
    assert tokenizer.id_bytes[eos] == 0 and tokenizer.id_bytes[user] == len(USER)
    assert tokenizer.decode(special) == f"{USER}hi".encode()


def _framed(backend, single):
    pairs = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return backend


@pytest.mark.parametrize(
    ("single", "settings", "starts"),
    [
        (None, {}, [EOS]),
        (f"{BOS} $A", {}, [BOS]),
        (f"{BOS} {BOS} $A {EOS}", {}, [BOS, BOS]),
        (f"$A {EOS}", {}, [EOS]),
        (None, {"add_bos_token": True, "bos_token": BOS}, [BOS]),
        (f"$A {EOS}", {"add_bos_token": True, "bos_token": {"content": BOS}}, [BOS]),
        (f"{BOS} $A", {"add_bos_token": False, "bos_token": BOS}, [EOS]),
        (None, {"add_bos_token": True, "bos_token": None}, [EOS]),
    ],
)
def test_what_stands_before_a_text(single, settings, starts, tmp_path):
    backend = byte_level(GPT2)
    if single is not None:
        _framed(backend, single)
    tokenizer = opened(backend, tmp_path, eos_token=EOS, **settings)
    assert tokenizer.start_ids == tuple(map(backend.token_to_id, starts))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, EOS),
        ({"tokenizer_config.json": {"eos_token": BOS}}, BOS),
        ({"tokenizer_config.json": {"eos_token": {"content": BOS, "lstrip": False}}}, BOS),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": BOS}}, BOS),
        ({"generation_config.json": {"eos_token_id": [1, 0]}, "config.json": {"eos_token_id": 0}}, BOS),
        ({"config.json": {"eos_token_id": 1}}, BOS),
        ({"config.json": {"eos_token_id": None, "model": {}}}, EOS),
    ],
)
def test_files_beside_it_say_which_token_ends_a_document(files, expected, tmp_path):
    backend = byte_level(GPT2)
    assert backend.token_to_id(BOS) == 1
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert opened(backend, tmp_path).eos_id == backend.token_to_id(expected)


def test_files_beside_one_of_another_name_are_of_other_models(tmp_path):
    backend = byte_level(GPT2)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    backend.save(str(tmp_path / "other.json"))
    tokenizer = open_tokenizer(tmp_path / "other.json")
    assert tokenizer.eos_id == backend.token_to_id(EOS) and tokenizer.name == "other.json"


def test_ids_may_have_gaps(tmp_path):
    tree = json.loads(byte_level(GPT2).to_str())
    tree["added_tokens"][-1]["id"] = 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = open_tokenizer(tmp_path)
    # The library numbers added tokens on from the vocabulary, whatever the file says.
    assert tokenizer.vocab_size == max(tokenizer._backend.get_vocab().values()) + 1
    model = library.Tokenizer(models.BPE({"a": 0, "b": 7, "</s>": 9}, []))
    model.pre_tokenizer, model.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "gaps.json"))
    tokenizer = open_tokenizer(tmp_path / "gaps.json")
    assert tokenizer.vocab_size == 10 and tokenizer.id_bytes.tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert tokenizer.encode(b"ab").tolist() == [0, 7] and tokenizer.decode([0, 3, 7, 9]) == b"ab"


# ---- keeping and comparing


def test_a_copy_is_the_same_tokenizer(original, tmp_path):
    for name in ("given", "kept"):
        (tmp_path / name).mkdir()
    tokenizer = opened(original, tmp_path / "given", eos_token=original.id_to_token(0))
    tokenizer.save(tmp_path / "kept")
    kept = open_tokenizer(tmp_path / "kept")
    assert kept.fingerprint == tokenizer.fingerprint
    assert (kept.eos_id, kept.start_ids) == (tokenizer.eos_id, tokenizer.start_ids) and kept.eos_id == 0
    for text in TORTURE:
        assert kept.encode(text.encode()).tolist() == tokenizer.encode(text.encode()).tolist()


def test_fingerprints_tell_apart_what_makes_other_ids(tmp_path):
    found = set()
    for number, settings in enumerate(({}, {"eos_token": BOS}, {"add_bos_token": True, "bos_token": BOS})):
        (tmp_path / str(number)).mkdir()
        found.add(opened(byte_level(GPT2), tmp_path / str(number), **settings).fingerprint)
    (tmp_path / "nfc").mkdir()
    nfc = PreTokenizer(GPT2.parts, library.normalizers.NFC())
    found.add(opened(byte_level(nfc), tmp_path / "nfc").fingerprint)
    assert len(found) == 4


def test_tokens_that_read_the_same_share_a_canonical_id(tmp_path):
    tokenizer = opened(sentencepiece(), tmp_path)
    ids = canonical_ids(tokenizer)
    assert ids.shape == (tokenizer.vocab_size,)
    id_of = tokenizer._backend.get_vocab()
    same = [ids[id_of[token]] for token in ("▁c", "c", "<0x43>")]
    assert len(set(same)) == 1
    assert ids[id_of["▁"]] == ids[id_of["<0x0A>"]] != ids[id_of["</s>"]]
    assert all((ids == ids[i]).sum() == 1 for i in tokenizer.special_ids)


# ---- refusals


def _of(model, decoder=None):
    backend = library.Tokenizer(model)
    backend.decoder = decoder
    backend.add_special_tokens(["</s>"])
    return backend.to_str()


BYTES = decoders.ByteLevel()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tokenizer\.json: must be a tokenizer\.json: "),
        ('{"model": {"type": "Own"}}', r"tokenizer\.json: must be a tokenizer\.json: "),
        ("\0\1", r"tokenizer\.json: must be a tokenizer\.json: "),
        (_of(models.WordLevel({"a": 0}, "a"), BYTES), r"model = 'WordLevel': must be one of BPE, Unigram"),
        (_of(models.WordPiece({"a": 0}, unk_token="a"), BYTES), r"model = 'WordPiece': must be one of BPE"),
        (_of(models.BPE({"a": 0}, [])), r"decoder = None: must say which text the tokens stand for"),
        (_of(models.BPE({"a": 0}, []), decoders.BPEDecoder()), r"decoder = 'BPEDecoder': must be one of"),
        (_of(models.BPE({"a": 0}, []), decoders.CTC()), r"decoder = 'CTC': must be one of ByteLevel"),
        (
            _of(models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), BYTES),
            r"model\.end_of_word_suffix = '</w>': must be empty",
        ),
        (
            library.Tokenizer(models.BPE({"a": 0}, [])).to_str(),
            r"nothing says which token ends a document: a tokenizer_config\.json beside it must have",
        ),
    ],
)
def test_a_bad_file_gets_one_line(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        open_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path / "tokenizer.json") in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: must be JSON in UTF-8"),
        ("config.json", "[]", r"config\.json: must be a JSON object, it is list"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<x>"}',
            r"tokenizer_config\.json: '<x>' must be a token of",
        ),
        ("config.json", '{"eos_token_id": 5000}', r"end-of-document token = 5000: there is no token with"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<s>", "add_bos_token": true, "bos_token": "<x>"}',
            r"tokenizer_config\.json: '<x>' must be a token of",
        ),
    ],
)
def test_bad_files_beside_it_get_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        opened(byte_level(GPT2), tmp_path)
    assert "\n" not in str(error.value)


def test_a_text_that_the_library_cannot_encode_gets_one_line(tmp_path):
    backend = library.Tokenizer(models.Unigram([("</s>", 0.0), ("▁", -1.0), ("a", -1.0)]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    tokenizer = opened(backend, tmp_path)
    assert tokenizer.encode(b"a a").tolist() == [1, 2, 1, 2]
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot encode a text: .*unk") as error:
        tokenizer.encode(b"b")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["missing.json", "", "missing/tokenizer.json"])
def test_a_missing_file_gets_one_line(path, tmp_path):
    with pytest.raises(UserError, match=r"no such file: a tokenizer comes from a tokenizer\.json, a folder"):
        open_tokenizer(tmp_path / path)


def test_a_broken_gguf_file_gets_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"model\.gguf"):
        open_tokenizer(tmp_path / "model.gguf")


def test_ids_beyond_any_vocabulary(tmp_path):
    """The library would take gigabytes for them."""
    tree = json.loads(byte_level(PRE_TOKENIZERS["gpt-2"]).to_str())
    tree["model"]["vocab"]["C"] = 2**31 - 1
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"tokenizer.json: largest id = 2147483647: must be below 16,777,216"):
        open_tokenizer(path)
