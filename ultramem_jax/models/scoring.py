"""Scores given continuations of contexts: the log-probability of each token, and whether it is the likeliest.

A context is read into a cache once, and all of its continuations are scored from there, as multiple choice
asks for. What is read has one of a few lengths, so few programs are compiled.
"""

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import at_least, choice, require
from ultramem_jax.models.cache import CACHE_DTYPES, Cache, empty_cache
from ultramem_jax.models.generation import read_chunk, rounded_up
from ultramem_jax.models.sampling import likeliest
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.models.transformer import Transformer
from ultramem_jax.tree_types import ArrayTree

Ids: TypeAlias = Sequence[int] | np.ndarray

LOGITS_BYTES = 1 << 28
"""Most bytes of the float32 logits of a chunk of continuations, as long as a token of each fits."""
_LONGEST_CHUNK = 256
"""Most tokens of each sequence that are read at a time."""
_SHORTEST_CHUNK = 16
_FEWEST_POSITIONS = 64
"""Cache positions of the smallest cache. Larger ones have four times as many, up to the most needed."""


class Score(NamedTuple):
    """Holds what a model says of a continuation."""

    log_probabilities: np.ndarray
    """(L,) float32, natural logarithm of the probability of each token after all before it in its window."""
    greedy: bool
    """True if each token is the likeliest one."""

    @property
    def total(self) -> float:
        """Returns the log-probability of the whole continuation, summed in float64."""
        return float(self.log_probabilities.sum(dtype=np.float64))


class _Row(NamedTuple):
    """Holds a context and pieces that follow it, longest first, in a row of a batch."""

    context: np.ndarray
    pieces: list[np.ndarray]
    numbers: list[int]
    """Number of each piece, by which its result is known."""


class _Requests(NamedTuple):
    """Holds what must be scored, each piece once, and where the results belong."""

    rows: list[_Row]
    of_pair: list[list[int]]
    """Numbers of each pair's pieces, in order."""
    pairs_of: list[list[int]]
    """Pairs in which the piece of each number lies."""


class Scorer:
    """Scores continuations under one model, in batches.

    Of context and continuation together, all tokens but the last must fit into `max_length`: the context is
    cut from the left. A continuation of more than `max_length` tokens is scored in pieces of that many, and
    the last piece has what remains; each has as much context as fits, at least the token before it. (So does
    `get_rolling_token_windows` of lm-evaluation-harness, with `context_len=1`.)
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, ArrayTree],
        *,
        max_length: int,
        batch_size: int = 8,
        cache_dtype: str = "float32",
    ):
        """Prepares the model for decoding.

        Args:
            config: the model's config.
            variables: `params`, `memory` and `buffers`, prepared (`prepare_for_decoding`) or not.
            max_length: the most tokens that are read at once, which is the length that the model was trained
                on.
            batch_size: B, contexts that are read together.
            cache_dtype: dtype of keys and values, see `empty_cache`.

        Raises:
            UserError: a value that is not allowed.
        """
        at_least(1, max_length=max_length, batch_size=batch_size)
        choice("cache_dtype", cache_dtype, CACHE_DTYPES)
        self._config, self._max_length, self._batch_size = config, max_length, batch_size
        self._cache_dtype = cache_dtype
        self._variables = prepare_for_decoding(config, variables)
        fitting = LOGITS_BYTES // (4 * batch_size * config.vocab_size)
        self._longest_piece_chunk = min(_LONGEST_CHUNK, 1 << max(fitting, 1).bit_length() - 1)
        self._read_context = jax.jit(functools.partial(read_chunk, config), donate_argnums=(1, 2))
        self._read_pieces = jax.jit(functools.partial(_read_pieces, config), donate_argnums=1)
        self._first_tokens = jax.jit(_first_tokens)

    @property
    def max_length(self) -> int:
        """Returns the most tokens that are read at once."""
        return self._max_length

    def with_variables(self, variables: dict[str, ArrayTree]) -> "Scorer":
        """Returns a scorer of other variables of the same model, such as later ones of a training.

        The two share their compiled programs.
        """
        other = copy.copy(self)
        other._variables = prepare_for_decoding(self._config, variables)
        return other

    def score(self, pairs: Iterable[tuple[Ids, Ids]]) -> list[Score]:
        """Returns the score of each pair, in order; arguments and errors are those of `stream`."""
        pairs = list(pairs)
        scores = dict(self.stream(pairs))
        return [scores[index] for index in range(len(pairs))]

    def stream(self, pairs: Iterable[tuple[Ids, Ids]]) -> Iterator[tuple[int, Score]]:
        """Yields the index of a pair and its score, as they are computed: pairs with long contexts first.

        Equal pairs are scored once.

        Args:
            pairs: contexts, of at least one id each, and their continuations. Ids are in [0, V).

        Raises:
            UserError: an empty context, or an id that the model does not have.
        """
        arrays = [(self._checked("context", a), self._checked("continuation", b)) for a, b in pairs]
        for index, (context, _) in enumerate(arrays):
            at_least(1, **{f"pairs[{index}], tokens of its context": len(context)})
        return self._stream(_requests(arrays, self._max_length))

    def _checked(self, name: str, ids: Ids) -> np.ndarray:
        array = np.asarray(ids, np.int64).reshape(-1)
        if len(array):
            inside = array.min() >= 0 and array.max() < self._config.vocab_size
            allowed = f"ids must be in [0, {self._config.vocab_size})"
            require(bool(inside), name, f"{array.min()} to {array.max()}", allowed)
        return array.astype(np.int32)

    def _stream(self, requests: _Requests) -> Iterator[tuple[int, Score]]:
        missing = [len(numbers) for numbers in requests.of_pair]
        for index, count in enumerate(missing):
            if count == 0:
                yield index, Score(np.empty(0, np.float32), True)
        found: dict[int, Score] = {}
        for first in range(0, len(requests.rows), self._batch_size):
            batch = self._score_batch(requests.rows[first : first + self._batch_size])
            found.update(batch)
            for index in (index for number in batch for index in requests.pairs_of[number]):
                missing[index] -= 1
                if missing[index] == 0:
                    scores = [found[number] for number in requests.of_pair[index]]
                    values = np.concatenate([score.log_probabilities for score in scores])
                    yield index, Score(values, all(score.greedy for score in scores))

    def _score_batch(self, rows: list[_Row]) -> dict[int, Score]:
        """Returns the scores of the pieces of up to B rows, by the pieces' numbers."""
        rounds = [_round(rows, k) for k in range(max(len(row.pieces) for row in rows))]
        # The last token of a piece is not read. Pieces come longest first, so the first round reads most.
        reads = [max(len(piece) for piece in pieces) - 1 for pieces in rounds]
        chunk = _bucket(reads[0], self._longest_piece_chunk)
        cache, logits = self._read_contexts(rows, rounded_up(reads[0], chunk))

        # The logits after the contexts predict the first token of every piece.
        targets = self._padded(
            [[piece[0] for piece in row.pieces] for row in rows], _power_of_two(len(rounds))
        )
        values, likely = map(np.asarray, self._first_tokens(logits, targets))
        parts = [
            [([values[b, k]], [likely[b, k]]) for k in range(len(row.pieces))] for b, row in enumerate(rows)
        ]

        reading = [k for k, count in enumerate(reads) if count > 0]
        for k in reading:
            # Later rounds start from the contexts again, and reading updates the cache in place.
            following = cache if k == reading[-1] else jax.tree.map(jnp.copy, cache)
            for first in range(0, reads[k], chunk):
                tokens = self._padded([piece[:-1][first : first + chunk] for piece in rounds[k]], chunk)
                after = [piece[1:][first : first + chunk] for piece in rounds[k]]
                following, *found = self._read_pieces(
                    self._variables, following, tokens, self._padded(after, chunk)
                )
                values, likely = map(np.asarray, found)
                for b, ids in enumerate(after):
                    if len(ids) > 0:
                        parts[b][k][0].extend(values[b, : len(ids)])
                        parts[b][k][1].extend(likely[b, : len(ids)])
        return {
            number: Score(np.array(parts[b][k][0], np.float32), all(parts[b][k][1]))
            for b, row in enumerate(rows)
            for k, number in enumerate(row.numbers)
        }

    def _read_contexts(self, rows: list[_Row], room: int) -> tuple[Cache, jax.Array]:
        """Returns a cache with the rows' contexts and `room` more positions, and the next logits (B, V)."""
        longest = max(len(row.context) for row in rows)
        chunk = _bucket(longest, _LONGEST_CHUNK)
        positions = self._positions(max(rounded_up(longest, chunk), longest + room))
        cache = empty_cache(self._config, self._batch_size, positions, self._cache_dtype)
        logits = jnp.zeros((self._batch_size, self._config.vocab_size), jnp.float32)
        for first in range(0, longest, chunk):
            parts = [row.context[first : first + chunk] for row in rows]
            counts = np.zeros(self._batch_size, np.int32)
            counts[: len(parts)] = [len(part) for part in parts]
            tokens = self._padded(parts, chunk)
            cache, logits = self._read_context(self._variables, cache, logits, tokens, counts)
        return cache, logits

    def _positions(self, needed: int) -> int:
        """Returns the length of a cache with at least `needed` positions, one of few."""
        most = rounded_up(self._max_length, _LONGEST_CHUNK) + _LONGEST_CHUNK
        if needed > most:  # a long context beside a long continuation
            return rounded_up(needed, most)
        length = _FEWEST_POSITIONS
        while length < needed:
            length *= 4
        return min(length, most)

    def _padded(self, rows: Sequence[Ids], length: int) -> np.ndarray:
        """Returns rows of ids as (B, length) int32, with zeros after them."""
        padded = np.zeros((self._batch_size, length), np.int32)
        for row, ids in zip(padded, rows, strict=False):
            row[: len(ids)] = ids
        return padded


def _round(rows: list[_Row], k: int) -> list[np.ndarray]:
    """Returns the k-th piece of each row, and for a row that has fewer a single token, which is not read."""
    return [row.pieces[k] if k < len(row.pieces) else np.zeros(1, np.int32) for row in rows]


def _read_pieces(
    config: ModelConfig,
    variables: dict[str, ArrayTree],
    cache: Cache,
    tokens: jax.Array,
    targets: jax.Array,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Reads tokens (B, C), with padding only after a row's last one, which no token of the row sees.

    Returns:
        The cache, log-probabilities of the targets (B, C) after them, and whether these are the likeliest.
    """
    logits, left = Transformer(config).apply(variables | {"cache": cache}, tokens, mutable=["cache"])
    best = likeliest(logits.reshape(-1, logits.shape[-1])).reshape(targets.shape)
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    return left["cache"], chosen - jax.nn.logsumexp(logits, axis=-1), best == targets


def _first_tokens(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities (B, K) of K targets under logits (B, V), and which are the likeliest."""
    chosen = jnp.take_along_axis(logits, targets, axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return chosen - total, likeliest(logits)[:, None] == targets


def _requests(pairs: list[tuple[np.ndarray, np.ndarray]], max_length: int) -> _Requests:
    """Cuts continuations into pieces, and collects the different ones by context."""
    by_context: dict[bytes, dict[bytes, int]] = {}
    of_pair: list[list[int]] = []
    pairs_of: list[list[int]] = []
    for index, (context, continuation) in enumerate(pairs):
        of_pair.append([])
        for seen, piece in _windows(context, continuation, max_length):
            numbers = by_context.setdefault(seen.tobytes(), {})
            number = numbers.setdefault(piece.tobytes(), len(pairs_of))
            if number == len(pairs_of):
                pairs_of.append([])
            of_pair[-1].append(number)
            pairs_of[number].append(index)
    rows = [row for context, pieces in by_context.items() for row in _rows(context, pieces)]
    # Rows of one length lie together. The longest come first, so that too large a batch fails at once.
    rows.sort(key=lambda row: (len(row.context), len(row.pieces[0])), reverse=True)
    return _Requests(rows, of_pair, pairs_of)


def _windows(
    context: np.ndarray, continuation: np.ndarray, max_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the pieces of a continuation, of up to `max_length` tokens, each after the context it sees."""
    ids = np.concatenate([context, continuation])
    for first in range(len(context), len(ids), max_length):
        end = min(first + max_length, len(ids))
        yield ids[max(end - max_length - 1, 0) : first], ids[first:end]


def _rows(context: bytes, pieces: dict[bytes, int]) -> Iterator[_Row]:
    """Yields rows for the pieces of a context.

    A row takes further pieces as long as it has no more tokens of them than of the context. Beyond that, the
    context is read again in another row, which costs less than it saves: rows of a batch are read together.
    """
    ids = np.frombuffer(context, np.int32)
    row = _Row(ids, [], [])
    tokens = 0
    for piece, number in sorted(pieces.items(), key=lambda item: -len(item[0])):
        array = np.frombuffer(piece, np.int32)
        tokens += len(array) - 1  # the last one is not read
        if row.pieces and tokens > len(ids):
            yield row
            row, tokens = _Row(ids, [], []), len(array) - 1
        row.pieces.append(array)
        row.numbers.append(number)
    yield row


def _bucket(length: int, longest: int) -> int:
    """Returns the tokens of a chunk for sequences of up to `length`: a power of two, at most `longest`."""
    return min(max(_power_of_two(length), _SHORTEST_CHUNK), longest)


def _power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least `number`, and at least 1."""
    return 1 << max(number - 1, 0).bit_length()
