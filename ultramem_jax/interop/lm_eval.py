"""Makes a model one of lm-evaluation-harness (EleutherAI), of which this module needs the package `lm_eval`.

`UltramemLM` is the harness's view of a model; `interop.lm_eval_tasks` evaluates it:

    lm = UltramemLM(loaded.config.model, loaded.variables, loaded.tokenizer, max_length=2048)
    results = evaluate_tasks(lm, ["hellaswag", "wikitext"], num_fewshot=5)
    print(markdown.table(result_rows(results)))
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from tqdm import tqdm

from ultramem_jax.config import ModelConfig
from ultramem_jax.data.tokenizers import Tokenizer
from ultramem_jax.errors import UserError, at_least, require
from ultramem_jax.models.generation import ENDED, Generator, text_generator
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.models.scoring import Scorer
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.tree_types import ArrayTree

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise UserError('needs lm-evaluation-harness: pip install "ultramem_jax[lm-eval]"') from error

log = logging.getLogger(__name__)

Request: TypeAlias = tuple[tuple[str, str], list[int], list[int]]
"""Texts of a context and its continuation, and the ids of both."""

_HEEDED = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
"""Arguments of a generation, as `normalize_gen_kwargs` names them, that `UltramemLM` follows."""


class UltramemLM(TemplateLM):
    """Makes a model of this library one of lm-evaluation-harness.

    It does what the harness's own adapter of Hugging Face models does (`HFLM`), with these differences:
    contexts that choices share are read once; a continuation may be longer than the window (see `Scorer`),
    and so may a generation (see `generate_until`). A beginning-of-sequence token is never scored, where the
    other scores it in rolling perplexities. Written forms of special tokens in a task stay text.
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, ArrayTree],
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int = 8,
        cache_dtype: str = "float32",
        add_start_ids: bool | None = None,
        seed: int = 0,
    ):
        """Prepares the model.

        Args:
            config: the model's config.
            variables: `params`, `memory` and `buffers`, prepared (`prepare_for_decoding`) or not.
            tokenizer: the one that the model was trained with.
            max_length: the most tokens of context, which is the length that the model was trained on.
            batch_size: sequences that are read together.
            cache_dtype: dtype of keys and values, see `empty_cache`.
            add_start_ids: whether the tokenizer's `start_ids` stand before every context. They always stand
                for an empty context, and before texts of which the perplexity is asked. None means that they
                do if they are more than the end-of-document token: then the tokenizer itself puts them there.
            seed: seed of the sampling.

        Raises:
            UserError: a value that is not allowed, or a tokenizer with more ids than the model has.
        """
        super().__init__()
        allowed = f"must be at most {config.vocab_size}, the model's vocabulary"
        require(
            tokenizer.vocab_size <= config.vocab_size, "tokenizer.vocab_size", tokenizer.vocab_size, allowed
        )
        require(0 <= seed < 2**32, "seed", seed, "must be in [0, 2**32)")
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._variables = prepare_for_decoding(config, variables)
        self._start = list(tokenizer.start_ids)
        self._add_start = self._start != [tokenizer.eos_id] if add_start_ids is None else add_start_ids
        self._cache_dtype = cache_dtype
        self.max_length, self.batch_size = max_length, batch_size
        self._scorer = Scorer(
            config, self._variables, max_length=max_length, batch_size=batch_size, cache_dtype=cache_dtype
        )
        self._generators: dict[Sampling, Generator] = {}

    max_gen_toks = 256
    """Most tokens of a generation of which the task does not say it."""

    @property
    def eot_token_id(self) -> int:
        """Returns the id of the end-of-document token, which ends a generation."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Returns the id that stands before a text without a context."""
        return self._start[-1]

    @property
    def tokenizer_name(self) -> str:
        """Returns a name by which caches of requests tell tokenizers apart."""
        return f"{self._tokenizer.name}-{self._tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text; a byte that is not UTF-8 is the lone surrogate that Python reads it as.

        The tokenizer's `start_ids` come first if `add_special_tokens` says so, or the model does by default.
        """
        ids: list[int] = self._tokenizer.encode(string.encode(errors="surrogateescape")).tolist()
        with_start = self._add_start if add_special_tokens is None else add_special_tokens
        return [*self._start, *ids] if with_start else ids

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, in nats, and whether it is the greedy one."""
        pairs = [(context or self._start, continuation) for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm) as bar:
            for index, score in self._scorer.stream(pairs):
                answers[index] = score.total, score.greedy
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                bar.update()
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text after the tokenizer's `start_ids`, in nats.

        A long text is cut into windows, as `Scorer` says. Every token counts once, and `start_ids` do not.
        """
        texts = [request.args[0] for request in requests]
        pairs = [(self._start, self.tok_encode(text, add_special_tokens=False)) for text in texts]
        answers = [0.0] * len(texts)
        with tqdm(total=len(texts), desc="scoring texts", disable=disable_tqdm) as bar:
            for index, score in self._scorer.stream(pairs):
                answers[index] = score.total
                self.cache_hook.add_partial("loglikelihood_rolling", (texts[index],), answers[index])
                bar.update()
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations up to a stop string, the end-of-document token or `max_gen_toks` tokens.

        Contexts are cut from the left, so that the generation fits into the window too. Where even the
        generation alone does not fit, the last half of the window is kept, and the window moves on as that of
        `Generator` does. Equal greedy requests are generated once.

        Each request has a context and arguments: `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p`
        and `top_k`; others are ignored, which the log says. Without `do_sample` or a temperature, the
        likeliest tokens are taken.
        """
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for number, (way, size, batch) in enumerate(self._batches(requests)):
                texts = self._generate([prompt for prompt, _ in batch], size, way, number)
                for text, (_, same) in zip(texts, batch, strict=True):
                    for index in same:
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(same))
        return answers

    def _batches(
        self, requests: list[Instance]
    ) -> Iterator[tuple["_Way", int, list[tuple[list[int], list[int]]]]]:
        """Yields how a batch is generated, its size, and its prompts, with the requests that each answers."""
        groups: dict[_Way, dict[str | int, list[int]]] = {}
        for index, request in enumerate(requests):
            context, arguments = request.args
            way = _way(arguments, self.max_gen_toks)
            # Equal requests that sample have draws of their own.
            key = context if way.sampling.temperature == 0 else index
            groups.setdefault(way, {}).setdefault(key, []).append(index)
        for way, equal in groups.items():
            prompts = [(self._prompt(requests[same[0]].args[0], way), same) for same in equal.values()]
            prompts.sort(key=lambda prompt: len(prompt[0]), reverse=True)
            size = min(self.batch_size, len(prompts))
            for first in range(0, len(prompts), size):
                yield way, size, prompts[first : first + size]

    def _prompt(self, context: str, way: "_Way") -> list[int]:
        room = self.max_length - way.max_tokens
        kept = room if room > 0 else max(self.max_length // 2, 1)
        return (self.tok_encode(context) or self._start)[-kept:]

    def _generate(self, prompts: list[list[int]], size: int, way: "_Way", number: int) -> list[str]:
        """Returns the continuations of a batch of prompts; `number` makes its draws differ from others'."""
        if way.sampling not in self._generators:
            self._generators[way.sampling] = text_generator(
                self._config,
                self._variables,
                self._tokenizer,
                window=self.max_length,
                sampling=way.sampling,
                cache_dtype=self._cache_dtype,
            )
        texts = [_Text(way.until) for _ in prompts]
        # A smaller batch is another program, so the last one gets prompts of which nobody sees the text.
        prompts = prompts + prompts[-1:] * (size - len(prompts))
        stream = self._generators[way.sampling].stream(
            prompts, way.max_tokens, seed=(self._seed + number) % 2**32
        )
        for tokens in stream:
            for text, token in zip(texts, tokens.tolist(), strict=False):
                if token == ENDED:
                    text.ended = True
                elif not text.ended:
                    text.add(self._tokenizer.decode([token], continuing=True))
            if all(text.ended for text in texts):
                break
        return [text.data.decode(errors="replace") for text in texts]


class _Way(NamedTuple):
    """Says how a request is generated."""

    sampling: Sampling
    until: tuple[bytes, ...]
    max_tokens: int


def _way(arguments: dict[str, Any], max_gen_toks: int) -> _Way:
    given = normalize_gen_kwargs(arguments, max_gen_toks)
    if others := given.keys() - _HEEDED:
        _warn_of(tuple(sorted(others)))
    sampling = Sampling(temperature=0.0)
    if given["do_sample"]:
        # None, and what is negative, stand for "all" in other packages.
        top_k, top_p = given.get("top_k") or 0, given.get("top_p")
        sampling = Sampling(
            temperature=float(given.get("temperature", 1.0)),
            top_k=max(int(top_k), 0),
            top_p=1.0 if top_p is None else float(top_p),
        )
    until = tuple(stop.encode(errors="surrogateescape") for stop in given["until"] if stop)
    at_least(1, max_gen_toks=given["max_gen_toks"])
    return _Way(sampling, until, given["max_gen_toks"])


@functools.cache
def _warn_of(names: tuple[str, ...]) -> None:
    log.warning("generation ignores %s, which a task asks for", ", ".join(names))


class _Text:
    """Collects the bytes of a text until one of the stop strings, which may span tokens, is in them."""

    def __init__(self, until: tuple[bytes, ...]):
        self.data, self.ended = bytearray(), False
        self._until, self._longest = until, max(map(len, until), default=0)

    def add(self, piece: bytes) -> None:
        """Appends bytes; the text ends before the first stop string."""
        start = max(len(self.data) - self._longest + 1, 0)
        self.data += piece
        places = [place for stop in self._until if (place := self.data.find(stop, start)) >= 0]
        if places:
            del self.data[min(places) :]
            self.ended = True
