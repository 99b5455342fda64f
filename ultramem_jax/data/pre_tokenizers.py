r"""Lists the pre-tokenizers of open models: how they cut a text into the words that byte-level BPE merges.

The regular expressions are those of the models' own `tokenizer.json`. llama.cpp (`src/llama-vocab.cpp`) has
them too, under the names that `tokenizer.ggml.pre` of a GGUF file has here.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    + _REST_WITH_SLASH
)
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _REST_WITH_SLASH
)

_CASED = (
    "A-Za-z"
    "\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Ranges of letters that have a case, as DeepSeek-LLM's expression lists them."""
_LINE_ENDS = r"[\r\n]"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

WORDS_AND_LINES = frozenset({_LLAMA3, _QWEN2, _QWEN35, _DEEPSEEK_V3, _LINE_ENDS})
"""Expressions that always cut at the places that `cutting` describes. Tekken's and o200k's do not: they take
a slash at the beginning of a line to punctuation at the end of the line before."""
WITHIN_WORDS = frozenset(
    {
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _CJK,
        rf"\s?[{_CASED}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"\s+$",
        "[0-9][0-9][0-9]",
    }
)
"""Expressions that cut further, and join nothing across those places."""


@dataclass(frozen=True)
class PreTokenizer:
    """Describes what a model does with a text before BPE merges its words."""

    parts: tuple[pre_tokenizers.PreTokenizer, ...]
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False
    """Whether a word that is in the vocabulary is one token, even if no merges lead to it."""
    add_bos: bool = False
    """Whether texts begin with the beginning-of-sequence token, where a GGUF file does not say."""

    @property
    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Returns it for a `tokenizers.Tokenizer`."""
        return self.parts[0] if len(self.parts) == 1 else pre_tokenizers.Sequence(list(self.parts))


def _split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(expression), "isolated")


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_EACH_DIGIT = pre_tokenizers.Digits(individual_digits=True)

_GPT2 = PreTokenizer((_GPT2_WORDS,))
_GPT_NEOX = PreTokenizer((_GPT2_WORDS,), normalizers.NFC())
_STARCODER = PreTokenizer((_EACH_DIGIT, _GPT2_WORDS))
_LLAMA_BPE = PreTokenizer((_split(_LLAMA3), _BYTES), ignore_merges=True, add_bos=True)
_QWEN = PreTokenizer((_split(_QWEN2), _BYTES), normalizers.NFC())
_GPT_4O = PreTokenizer((_split(_O200K), _BYTES))

PRE_TOKENIZERS = {
    # Files from before llama.cpp named pre-tokenizers have none, which it calls `default`.
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _GPT_NEOX,
    "olmo": _GPT_NEOX,
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "codeshell": _STARCODER,
    "command-r": PreTokenizer((_EACH_DIGIT, _GPT2_WORDS), normalizers.NFC()),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
    "qwen35": PreTokenizer((_split(_QWEN35), _BYTES), normalizers.NFC()),
    "tekken": PreTokenizer((_split(_TEKKEN), _BYTES), ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT_4O,
    "llama4": _GPT_4O,
    "deepseek-llm": PreTokenizer(
        (
            _split(_LINE_ENDS),
            _split(rf"\s?[{_CASED}]+"),
            _split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            _split(r"\s+$"),
            _split(_CJK),
            _EACH_DIGIT,
            _BYTES,
        )
    ),
    "deepseek-coder": PreTokenizer(
        (
            _split(_LINE_ENDS),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split(_CJK),
            _EACH_DIGIT,
            _BYTES,
        )
    ),
    "deepseek-v3": PreTokenizer(
        (
            _split(r"\p{N}{1,3}"),
            _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            _split(_DEEPSEEK_V3),
            _BYTES,
        )
    ),
    "falcon": PreTokenizer(
        (
            pre_tokenizers.Punctuation("contiguous"),
            _GPT2_WORDS,
            pre_tokenizers.Digits(individual_digits=False),
            _split("[0-9][0-9][0-9]"),
        )
    ),
}
"""Pre-tokenizers by their names in GGUF files."""
