"""Generates text from a model: it reads prompts in chunks into a cache, then adds one token after another.

Programs of the model are compiled for a batch. One for each of up to three sizes reads a chunk of every
prompt. Another takes a token of every sequence and samples the next one. They update the cache in place. A
small program samples the first token after the prompts.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.data.tokenizers import Tokenizer
from ultramem_jax.errors import at_least, choice, require
from ultramem_jax.models.cache import CACHE_DTYPES, Cache, empty_cache
from ultramem_jax.models.sampling import Sampling, sample
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.models.transformer import Transformer
from ultramem_jax.tree_types import ArrayTree

DecodingStep: TypeAlias = Callable[..., tuple[Cache, jax.Array]]
"""(variables, cache, tokens (B,), counts (B,) int32, seed, number of the token) -> (cache, tokens (B,)). A
count is 1, or 0 for a sequence that has ended; seed and number are uint32 and decide the draw."""

_SMALLEST_CHUNK = 64
"""Tokens of the smallest chunk of a prompt: each size is a program."""
ENDED = -1
"""Stands in place of the token of a sequence that has ended."""


def decoding_step(config: ModelConfig, sampling: Sampling, num_ids: int | None = None) -> DecodingStep:
    """Returns the step that takes a token of every sequence through a model and samples the next one.

    Compile it with the cache donated.

    Args:
        config: the model's config.
        sampling: how a token is chosen.
        num_ids: only ids below it are sampled; None is all of the model's.
    """

    def step(
        variables: dict[str, ArrayTree],
        cache: Cache,
        tokens: jax.Array,
        counts: jax.Array,
        seed: jax.Array,
        number: jax.Array,
    ) -> tuple[Cache, jax.Array]:
        cache, logits = _apply(config, variables, cache, tokens[:, None], counts)
        return cache, _choose(sampling, num_ids, logits, seed, number)

    return step


def _apply(
    config: ModelConfig, variables: dict[str, ArrayTree], cache: Cache, tokens: jax.Array, counts: jax.Array
) -> tuple[Cache, jax.Array]:
    """Reads tokens (B, C), of which `counts` (B,) are not padding -> the cache and the next logits (B, V)."""
    inputs = variables | {"cache": cache}
    logits, left = Transformer(config).apply(inputs, tokens, counts=counts, mutable=["cache"])
    return left["cache"], logits


def read_chunk(
    config: ModelConfig,
    variables: dict[str, ArrayTree],
    cache: Cache,
    logits: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Reads a chunk of every prompt into the cache.

    Compile it with cache and logits donated.

    Args:
        config: the model's config.
        variables: those of `prepare_for_decoding`.
        cache: what was read before.
        logits: (B, V), those after the tokens before.
        tokens: (B, C).
        counts: (B,) int32, tokens of each prompt that are not padding.

    Returns:
        The cache, and the logits (B, V) after each prompt's tokens; those of a prompt without any stay.
    """
    cache, new = _apply(config, variables, cache, tokens, counts)
    return cache, jnp.where(counts[:, None] > 0, new, logits)


def _choose(
    sampling: Sampling, num_ids: int | None, logits: jax.Array, seed: jax.Array, number: jax.Array
) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), number)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits), dtype=jnp.uint32))
    return sample(logits[:, :num_ids], keys, sampling)


class Generator:
    """Continues batches of prompts, of any lengths, with one model.

    A sequence's continuation does not depend on the others in its batch, except for the rounding of sums, as
    long as `window` holds all of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, ArrayTree],
        *,
        window: int,
        sampling: Sampling | None = None,
        stop_id: int | None = None,
        num_ids: int | None = None,
        cache_dtype: str = "float32",
        prefill_chunk: int = 256,
    ):
        """Prepares the model for decoding.

        Args:
            config: the model's config.
            variables: `params`, `memory` and `buffers`, prepared (`prepare_for_decoding`) or not.
            window: the most tokens of context, which is the length that the model was trained on. When they
                are used up, the newer half of them is read again, and positions start anew.
            sampling: how a token is chosen; by default at temperature 1.
            stop_id: ends a sequence, and is not part of it. None means that no token does.
            num_ids: only ids below it are sampled, those that the tokenizer has; None is all of the model's.
            cache_dtype: dtype of keys and values, see `empty_cache`.
            prefill_chunk: the most tokens of each prompt that are read at a time. Shorter prompts, and what
                remains of longer ones, are read in smaller chunks, down to 64.

        Raises:
            UserError: a value that is not allowed.
        """
        at_least(1, window=window, prefill_chunk=prefill_chunk)
        choice("cache_dtype", cache_dtype, CACHE_DTYPES)
        if num_ids is not None:
            allowed = f"must be in [1, {config.vocab_size}], the model's vocabulary"
            require(1 <= num_ids <= config.vocab_size, "num_ids", num_ids, allowed)
        self._config, self._window, self._stop_id = config, window, stop_id
        self._chunks = _chunk_sizes(min(prefill_chunk, window))
        self._variables = prepare_for_decoding(config, variables)
        sampling = sampling or Sampling()

        self._read_chunk = jax.jit(partial(read_chunk, config), donate_argnums=(1, 2))
        self._choose = jax.jit(partial(_choose, sampling, num_ids))
        # One program: made one by one, the 60 arrays of 30 layers take 30 ms.
        empty = partial(empty_cache, config, dtype=cache_dtype)
        self._empty_cache = jax.jit(empty, static_argnums=(0, 1))
        self._step = jax.jit(decoding_step(config, sampling, num_ids), donate_argnums=1)

    def stream(
        self, prompts: Sequence[Sequence[int] | np.ndarray], num_tokens: int, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """Yields tokens as they are sampled.

        Args:
            prompts: B prompts of ids in [0, V), with at least one id each. Of a longer prompt only the last
                `window` tokens are read.
            num_tokens: the most tokens to add to each prompt.
            seed: seed of the sampling, in [0, 2³²). A draw depends only on it, the sequence's index in the
                batch and the number of the token.

        Yields:
            (B,) int32, with `ENDED` for a sequence that has ended. It stops when all have ended.

        Raises:
            UserError: no prompt, an empty one, an id that the model does not have, or another number that
                is not allowed.
        """
        self._check(prompts)
        at_least(1, num_tokens=num_tokens)
        require(0 <= seed < 2**32, "seed", seed, "must be in [0, 2**32)")
        return self._stream([[int(i) for i in prompt] for prompt in prompts], num_tokens, np.uint32(seed))

    def generate(
        self, prompts: Sequence[Sequence[int] | np.ndarray], num_tokens: int, seed: int = 0
    ) -> list[np.ndarray]:
        """Returns the continuation of each prompt, (<= num_tokens,) int32.

        Arguments and errors are those of `stream`.
        """
        columns = np.stack(list(self.stream(prompts, num_tokens, seed)), axis=1)
        return [row[row != ENDED] for row in columns]

    def _stream(self, sequences: list[list[int]], num_tokens: int, seed: np.uint32) -> Iterator[np.ndarray]:
        cache, logits, used = self._read(sequences, self._window)
        tokens = self._choose(logits, seed, np.uint32(0))
        ended = np.zeros(len(sequences), bool)
        for number in range(1, num_tokens + 1):
            ids = np.array(tokens)
            if self._stop_id is not None:
                ended |= ids == self._stop_id
            ids[ended] = ENDED
            yield ids
            if number == num_tokens or ended.all():
                return
            for sequence, token in zip(sequences, ids.tolist(), strict=True):
                if token != ENDED:
                    sequence.append(token)
            which = seed, np.uint32(number)
            if used == self._window:
                del cache  # frees it before a second one is made
                cache, logits, used = self._read(sequences, max(self._window // 2, 1))
                tokens = self._choose(logits, *which)
            else:
                counts = jnp.asarray(~ended, jnp.int32)
                cache, tokens = self._step(self._variables, cache, tokens, counts, *which)
                used += 1

    def _read(self, sequences: list[list[int]], most: int) -> tuple[Cache, jax.Array, int]:
        """Reads the last `most` tokens of each sequence into a new cache.

        Returns:
            The cache, logits (B, V) of the next token, and the number of cache positions used.
        """
        seen = [sequence[-most:] for sequence in sequences]
        lengths = np.array([len(sequence) for sequence in seen], np.int32)
        smallest = self._chunks[-1]
        tokens = np.zeros((len(seen), rounded_up(int(lengths.max()), smallest)), np.int32)
        for row, sequence in zip(tokens, seen, strict=True):
            row[: len(sequence)] = sequence
        positions = rounded_up(self._window, smallest)
        cache = self._empty_cache(len(seen), positions)
        logits = jnp.zeros((len(seen), self._config.vocab_size), jnp.float32)
        first = 0
        while (left := tokens.shape[1] - first) > 0:
            chunk = next(size for size in self._chunks if size <= left)
            counts = np.clip(lengths - first, 0, chunk)
            part = tokens[:, first : first + chunk]
            cache, logits = self._read_chunk(self._variables, cache, logits, part, counts)
            first += chunk
        return cache, logits, int(lengths.max())

    def _check(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> None:
        at_least(1, prompts=len(prompts))
        for number, prompt in enumerate(prompts):
            at_least(1, **{f"prompts[{number}], its tokens": len(prompt)})
            allowed = f"ids must be in [0, {self._config.vocab_size})"
            inside = min(prompt) >= 0 and max(prompt) < self._config.vocab_size
            require(bool(inside), f"prompts[{number}]", f"{min(prompt)} to {max(prompt)}", allowed)


def _chunk_sizes(largest: int) -> tuple[int, ...]:
    """Returns the sizes of chunks, largest first: up to 64 tokens, and doubles of that up to `largest`."""
    sizes = [min(largest, _SMALLEST_CHUNK)]
    while 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    return tuple(reversed(sizes))


def rounded_up(number: int, step: int) -> int:
    """Returns the smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step


class TokenStream(Protocol):
    """Describes what `stream_texts` needs of a generator."""

    def stream(
        self, prompts: Sequence[Sequence[int] | np.ndarray], num_tokens: int, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """Yields tokens as `Generator.stream` does."""


def text_generator(
    config: ModelConfig, variables: dict[str, ArrayTree], tokenizer: Tokenizer, **options: Any
) -> Generator:
    """Returns a `Generator` for a tokenizer's ids, which stops at the end of a document.

    Args:
        config: the model's config.
        variables: the variables that `Generator` takes.
        tokenizer: the one that the model was trained with.
        **options: further arguments of `Generator`; `window` must be among them.
    """
    return Generator(config, variables, stop_id=tokenizer.eos_id, num_ids=tokenizer.vocab_size, **options)


def stream_texts(
    generator: TokenStream,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    seed: int = 0,
    *,
    special: bool = False,
) -> Iterator[list[str]]:
    """Yields continuations of texts, piece by piece.

    Before each prompt goes what stands before documents in training: the tokenizer's own first tokens, or the
    end-of-document token. So a prompt may be empty.

    Args:
        generator: the result of `text_generator`.
        tokenizer: the same.
        prompts: texts. A byte that is not UTF-8 is the lone surrogate that Python reads it as.
        num_tokens: the most tokens for each.
        seed: seed of the sampling.
        special: whether written forms of special tokens in the prompts become these tokens, as in
            `Tokenizer.encode`. A prompt that begins with the first tokens does not get them again.

    Yields:
        The next piece of each text. If several tokens make up a character, it comes with the last of them.
        What is not UTF-8 comes as U+FFFD.
    """
    texts = [prompt.encode(errors="surrogateescape") for prompt in prompts]
    start = list(tokenizer.start_ids)
    ids = [tokenizer.encode(text, special).tolist() for text in texts]
    ids = [prompt if prompt[: len(start)] == start else start + prompt for prompt in ids]
    # After an empty prompt, the first token is the first of a document.
    continuing = [prompt != start for prompt in ids]
    readers = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
    for tokens in generator.stream(ids, num_tokens, seed):
        yield [
            "" if token == ENDED else reader.decode(tokenizer.decode([token], continued))
            for token, reader, continued in zip(tokens.tolist(), readers, continuing, strict=True)
        ]
        continuing = [True] * len(prompts)
    yield [reader.decode(b"", final=True) for reader in readers]


def continue_texts(
    generator: TokenStream,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    seed: int = 0,
    *,
    special: bool = False,
) -> list[str]:
    """Returns the whole continuations; arguments as for `stream_texts`."""
    pieces = stream_texts(generator, tokenizer, prompts, num_tokens, seed, special=special)
    return ["".join(of_text) for of_text in zip(*pieces, strict=True)]
