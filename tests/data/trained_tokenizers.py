"""Small tokenizers of every kind, trained with the library `tokenizers`, and texts that are hard for them."""

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ultramem_jax.data.pre_tokenizers import PreTokenizer

PROSE = (
    "The cat sat on the mat, and it's 1234 o'clock.\n\nWE'LL see: def f(x):\n    return x ** 2  # 42\n"
    "\t漢字か naïve café — مرحبا สวัสดี 🙂👩‍👩‍👧 e\u0301 12345!\n/usr/bin \r\n\r\n  a += b?) don't I'VE\n"
)
TORTURE = [
    "",
    " ",
    "  two  ",
    "\n",
    "\n\n  a\n\n\n b\t\tc \r\n d",
    "\r\n\r\n",
    " leading",
    "trailing ",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    "x!\n/y //z\n///\n",
    "0 12 345 6789 12345 1.5e-10 0xFF ½²٣१२",
    "I'm you're he's we'll they'd I've don't I'M YOU'RE HE'S WE'LL THEY'D I'VE 'S 'sx",
    "🏳️‍🌈👩‍👩‍👧‍👦 👍🏽",
    "e\u0301 a\u0308 \u0301x é",
    "مرحبا بالعالم ١٢٣ 我想在apple工作～、。 สวัสดีชาวโลก 한국어 Привет",
    "a\0b\x01\x1f\x7f\x80\x85\u00a0\u2003\u3000\u200b\ufeff\u2028\u2029",
    "<|endoftext|> <s>x</s><unk><0x0A><|user|>[PAD7]",
    "▁a ▁▁ b▁",
    "z" * 300,
    "the" * 100 + " " * 40 + "x",
    "\n" * 20 + "x" + "\t" * 9 + "y",
    "HTTPServer mixedCASEWords ǅ ﬁ Ⅷ",
    "$100 €5 + - = < > ^ ~ | ` \\ … “”‘’",
    "a\r\nb\rc\n\rd",
]
EOS, BOS, USER = "<|endoftext|>", "<s>", "<|user|>"


def _trained(
    backend: tokenizers.Tokenizer,
    size: int,
    special: list[str],
    alphabet: Iterable[str] = (),
    text: str = PROSE,
) -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    backend.train_from_iterator([text] * 4, trainer)
    return backend


def byte_level(kind: PreTokenizer, prefix: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE of one kind, with `EOS`, `BOS` and the added token `USER`, which is not special."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=kind.ignore_merges))
    if kind.normalizer is not None:
        backend.normalizer = kind.normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True) if prefix else kind.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    _trained(backend, 420, [EOS, BOS], pre_tokenizers.ByteLevel.alphabet())
    backend.add_tokens([AddedToken(USER, normalized=False)])
    return backend


def sentencepiece(prefix: bool = True, lines: bool = True) -> tokenizers.Tokenizer:
    """BPE over characters with tokens for bytes, as Llama's, and its BOS.

    Without `lines`, no token has a line end beside another character.
    """
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else normalizers.Sequence([blanks])
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = ["<unk>", BOS, "</s>"]
    # Words are cut only while it learns, as otherwise it would learn the whole text.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    text = PROSE if lines else PROSE.replace("\n", " ")
    _trained(backend, 360, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], text=text)
    tree = json.loads(backend.to_str())
    tree["pre_tokenizer"] = None
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in special]
    backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 1)]
    )
    return backend


def unigram() -> tokenizers.Tokenizer:
    """Unigram with "▁" for blanks and tokens for bytes."""
    words = [("▁", -2.0), ("▁the", -2.5), ("the", -3.0), *((c, -4.0) for c in "abcdefghijklmnopqrstuvwxyz.")]
    vocab = [("</s>", 0.0), ("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), *words]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=1, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    backend.add_special_tokens(["</s>", "<unk>"])
    return backend
